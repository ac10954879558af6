"""The real commands in processes of their own: what they print, and the code they leave."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from ssl_pipeline import __version__, cli
from ssl_pipeline.config.compose import config_root
from ssl_pipeline.config.help import has_yaml, help_of, lines_of
from tests.runs import ROOT, TINY_ON_ANY_DATA, command, forked, ssl_pipeline

# Calls every verb in one process: with --help, which imports nothing large, ...
CALL = """
import contextlib, importlib, io, json, sys
from ssl_pipeline import cli

def told(*words):
    sys.argv, out = ["ssl-pipeline", *words], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = cli.main()
        except SystemExit as left:
            code = left.code
    return [code or 0, out.getvalue()]
"""
HELP = f"""{CALL}
found = {{"--help": {{verb: told(*verb.split(), "--help") for verb in cli.VERBS}}}}
found["imported"] = sorted({{"torch", "lightly", "numpy", "matplotlib", "wandb"}} & sys.modules.keys())
print(json.dumps(found))
"""
# ... and in another one by itself (what would run is composed and not run), and with a typo.
BARE_AND_TYPO = f"""{CALL}
needed = {{"prepare": "x", "predict": "x y", "export": "x --to onnx", "report": "x", "dashboard": "a/b"}}
found = {{"typo": {{}}, "bare": {{}}}}
from ssl_pipeline.config.command import load
for verb, (module, _) in cli.VERBS.items():
    loaded = importlib.import_module(module)
    typo = "sede=3" if hasattr(loaded, "run_command") else needed.get(verb, "") + " --sede"
    found["typo"][verb] = told(*verb.split(), *typo.split())
    if hasattr(loaded, "run_command"):
        loaded.run_command = lambda name, schema, *_: print(load(name, schema) and f"{{name}} would run")
    found["bare"][verb] = told(*verb.split())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place, found = tmp_path_factory.mktemp("verbs"), dict[str, Any]()
    for done in (command(sys.executable, "-c", HELP, cwd=place), forked("-c", BARE_AND_TYPO, cwd=place)):
        assert done.returncode == 0, done.stderr
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verb_alone_would_run_or_says_what_it_needs(verb: str, told: dict[str, Any]) -> None:
    code, text = told["bare"][verb]
    assert "Traceback" not in text
    if code:
        assert code == 2
        assert "the following arguments are required" in text
    else:
        assert "would run" in text or "wrote temperature.svg" in text


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verb_with_a_typo_names_it(verb: str, told: dict[str, Any]) -> None:
    code, text = told["typo"][verb]
    assert code == 2
    assert "Traceback" not in text
    assert "sede" in text


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verb_has_a_help_of_its_own(verb: str, told: dict[str, Any]) -> None:
    code, text = told["--help"][verb]
    assert code == 0
    assert text.startswith(f"usage: ssl-pipeline {verb} ")


def test_help_imports_no_library_of_tensors(told: dict[str, Any]) -> None:
    assert not told["imported"]


@pytest.mark.parametrize(
    ("verb", "there", "absent"),
    [
        ("pretrain", ["pretext=simclr", "batch_size=256 ", "quickstart_pretrain"], ["regime=", "quickstart_study", "per_class"]),
        ("finetune", ["regime=lp_ft", "labels.per_class=null"], ["pretext=", "recipe/", "quickstart_pretrain"]),
        ("plot-views", ["rows=8", "epochs=4", "transform=small"], ["pretext=", "batch_size", "optim="]),
        ("study", ["encoders", "quickstart_study"], ["backbone=", "quickstart_pretrain"]),
        ("study domain", ["comparison=methods", "targets=[textured, edges]"], ["pretext=", "data="]),
        ("export", ["--to FORMAT", "torch.export"], ["key=value"]),
    ],
)  # fmt: skip
def test_help_lists_what_the_verb_takes(verb: str, there: list[str], absent: list[str], told: dict[str, Any]) -> None:
    text = told["--help"][verb][1]
    assert [part for part in there if part not in text] == []
    assert [part for part in absent if part in text] == []
    assert max(map(len, text.splitlines())) <= 140


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if has_yaml(verb)])
def test_help_has_a_word_for_every_key(verb: str) -> None:
    path = config_root() / f"{re.sub('[ -]', '_', verb)}.yaml"
    lines = list(lines_of(path.read_text()))
    said = {line.key for line in lines if line.said}
    silent = [
        line.key for line in lines if not line.is_group and line.value and not said & {line.key, line.key.split(".")[0]}
    ]
    assert silent == []
    # What is shown as a default is one: the YAML parser agrees.
    tree = yaml.safe_load(path.read_text())
    for line in lines:
        if not line.is_group and line.value:
            value = tree
            for part in [line.key] if "." not in line.key else line.key.split(".", 1):
                value = value[part]
            assert (line.value if isinstance(value, str) else yaml.safe_load(line.value)) == value


def test_help_lists_the_keys_of_a_choice(tmp_path: Path) -> None:
    (tmp_path / "pretext").mkdir()
    (tmp_path / "pretext" / "mine.yaml").write_text("name: simclr\nlayers: 3   # of the head\n")
    text = help_of("pretrain", "", ["pretext=mine", "optim=lars"], tmp_path)
    assert re.search(r"pretext\.layers=3 +of the head", text)
    assert "optim.trust_coefficient=0.001" in text
    assert "swav, vicreg" in text
    assert ", mine," in text


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verb_is_found_with_and_without_words_after_it(verb: str) -> None:
    assert cli.verb_of(verb.split()) == (verb, [])
    assert cli.verb_of([*verb.split(), "x=3", "--help"]) == (verb, ["x=3", "--help"])


def test_a_verb_of_two_words_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        cli.verb_of(["study", "domian"])
    assert "Did you mean 'study domain'?" in capsys.readouterr().err
    (tmp_path / "domian").mkdir()
    assert cli.verb_of(["study", "domian"]) == ("study", ["domian"])


def test_the_verb_alone_is_given_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    module = SimpleNamespace(main=lambda: seen.append(sys.argv[1:]))
    monkeypatch.setattr("importlib.import_module", lambda _: module)
    for words in (["pretrain"], ["study"], ["study", "domain"], ["study", "domain", "seeds=1"]):
        monkeypatch.setattr(sys, "argv", ["ssl-pipeline", *words])
        cli.main()
    assert seen == [[], [], [], ["seeds=1"]]


@pytest.mark.parametrize(("words", "start"), [([], "usage: "), (["help"], "usage: "), (["--version"], __version__)])
def test_the_program_itself(
    words: list[str], start: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ssl-pipeline", *words])
    cli.main()
    assert capsys.readouterr().out.removeprefix("ssl-pipeline ").startswith(start)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pretrain", "pretext.temprature=1", "optim.lr=-1"], ["2 things", "`temperature`", "`optim.lr`"]),
        (["pretrain", "data=folder", "data.path=nowhere"], ["'nowhere' does not exist"]),
    ],
)
def test_mistakes_are_sentences_with_exit_code_2(words: list[str], expected: list[str], tmp_path: Path) -> None:
    done = ssl_pipeline(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for text in expected:
        assert text in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    done = command(
        "bash", "-c", f"set -o pipefail; {sys.executable} -m ssl_pipeline.cli pretrain --cfg job | true", cwd=tmp_path
    )
    assert done.returncode == 0
    assert not done.stderr


def test_help_and_cfg_run_nothing(tmp_path: Path) -> None:
    shown = ssl_pipeline("pretrain", "--cfg", "job", "transform.size=20", cwd=tmp_path)
    assert "size: 20" in shown.stdout
    assert "tracking:" in shown.stdout
    helped = ssl_pipeline("finetune", "--help", cwd=tmp_path)
    assert "regime=" in helped.stdout
    assert not list(tmp_path.iterdir())


def test_the_wheel_carries_the_configs_and_users_bring_their_own(tmp_path: Path) -> None:
    built = command(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path / "dist", ".")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    target, work, mine = tmp_path / "site", tmp_path / "elsewhere", tmp_path / "mine"
    installed = command(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel
    )
    assert installed.returncode == 0, installed.stderr
    work.mkdir()
    (mine / "transform").mkdir(parents=True)
    (mine / "transform" / "tiny.yaml").write_text("size: 10\nnum_views: 2\n")
    words = [w for w in TINY_ON_ANY_DATA if not w.startswith("transform.size")]
    done = command(
        sys.executable, "-m", "ssl_pipeline.pretrain", *words, "steps=2", "transform=tiny", "--config-dir", mine,
        "output=run", cwd=work, PYTHONPATH=str(target),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    card = json.loads((work / "run" / "card.json").read_text())
    assert card["blueprint"]["size"] == 10
    assert {path.name for path in work.iterdir()} == {"run"}  # no Hydra folders, no change of directory


def test_readme_names_no_command_that_is_not_there() -> None:
    text = (ROOT / "README.md").read_text()
    verbs = set(re.findall(r"^ssl-pipeline ([a-z-]+)", text, flags=re.MULTILINE))
    from ssl_pipeline.cli import VERBS

    assert verbs
    assert verbs <= set(VERBS)
    for script in re.findall(r"bash (launch/\S+\.sh)", text):
        assert (ROOT / script).is_file()
