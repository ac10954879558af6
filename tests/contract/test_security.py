"""What may not stand in the package: calls that run what a file says, or write where an archive says. Reads the source."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator

from tests.contract.parsed import FILES, parsed
from tests.runs import ROOT

NEVER = {
    "eval", "exec", "compile", "pickle.load", "pickle.loads", "dill.load", "joblib.load", "marshal.loads", "shelve.open",
    "pd.read_pickle", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "os.system",
    "os.popen", "shutil.unpack_archive",
}  # fmt: skip
UNPACKS = {"extract", "extractall"}
ONLY_WITH = {  # a call's last name, the word it needs, and what that has to be
    "torch.load": ("weights_only", True),
    "get_state_dict": ("weights_only", True),
    "load_state_dict_from_url": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def faults(tree: ast.AST) -> list[str]:
    found = []
    for name, call in calls(tree):
        words = {word.arg: word.value for word in call.keywords}
        last = name.rsplit(".", 1)[-1]
        if name in NEVER or (last in UNPACKS and "." in name and name.split(".")[0] != "re"):
            found.append(name)
        for key in (name, last):
            if key in ONLY_WITH:
                word, value = ONLY_WITH[key]
                given = words.get(word)
                if not (isinstance(given, ast.Constant) and given.value is value):
                    found.append(f"{name} without {word}={value}")
        if "trust_remote_code" in words or (isinstance(words.get("shell"), ast.Constant) and words["shell"].value):  # type: ignore[attr-defined]
            found.append(f"{name} with trust_remote_code or a shell")
    return sorted(set(found))


def test_no_file_is_trusted() -> None:
    assert len(FILES) > 100
    assert {path: found for path in FILES if (found := faults(parsed(path)))} == {}


def test_the_reader_sees_them() -> None:
    source = (
        "torch.load(f)\ntorch.load(f, weights_only=False)\nnp.load(f)\neval(s)\narchive.extractall(p)\nentry.get_state_dict()\n"
        "load_dataset(n, trust_remote_code=True)\nrun(s, shell=True)\npickle.loads(b)\ntorch.load(f, weights_only=True)"
    )
    assert len(faults(ast.parse(source))) == 8


def test_every_dependency_has_a_least_version_and_large_ones_a_greatest() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    for requirement in wanted:
        assert requirement.startswith("ssl-pipeline[") or ">=" in requirement, requirement
    for name in (
        "accelerate",
        "lightly",
        "hydra-core",
        "omegaconf",
        "pydantic",
    ):  # whose insides or formats are built on
        assert any(requirement.startswith(f"{name}>=") and ",<" in requirement for requirement in wanted), name
