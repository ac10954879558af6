"""Every command that README and docs tell people to type is understood by its program; those of the guides really run."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from torch import nn
from torchvision.models import resnet18

from docs.site.reference import configured_verbs
from ssl_pipeline.cli import VERBS
from tests.docs.commands import Command, all_commands, commands_of
from tests.pictures import color_folder
from tests.runs import ROOT
from tests.shapes import box_folder, mask_folder, number_table

SHELL = {"cd", "find", "ls", "cat", "export", "pre-commit", "git", "source"}
CONFIGURED = {verb.name for verb in configured_verbs()}
COMMANDS = {command.words: command for command in sorted(all_commands(), key=lambda command: command.whole)}


class UnderstoodError(Exception):
    """Raised in the place of what a verb would do."""


def check(command: Command) -> None:
    """Fails where the program that a command names would not understand it."""
    program, *rest = command.words
    match program:
        case "ssl-pipeline":
            check_verb(rest, command.whole)
        case "accelerate":
            assert rest[0] == "launch"
            if command.whole or rest[-1].startswith("launch/p"):
                options = launch_command_parser().parse_args(rest[1:])
                check_launch(options, command.whole)
        case "bash" | "sbatch":
            assert (ROOT / next(word for word in rest if not word.startswith("-"))).is_file()
        case "pip":
            check_extras(rest)
        case "python":
            assert find_spec(rest[1]) if rest[0] == "-m" else (ROOT / rest[0]).is_file()
        case _:
            assert program in SHELL, f"nobody checks {program!r}"


def check_launch(options: argparse.Namespace, whole: bool) -> None:
    if options.config_file:
        assert (ROOT / options.config_file).is_file()
    script = options.training_script
    if options.module:
        assert find_spec(script)
    else:  # from the project's root, or after `cd launch`
        assert (ROOT / script).is_file() or (ROOT / "launch" / script).is_file()
    check_verb([re.split(r"[./]", script)[-1], *options.training_script_args], whole)


def check_verb(words: list[str], whole: bool) -> None:
    """Lets the verb itself read its words: the configuration is composed and validated, options are parsed, nothing is run."""
    if not whole:  # in a line of text a choice may be the reader's own, and required words may be left out
        words = [word for word in words if not re.search(r"=(mine|[A-Z]+)$", word)]
        if len(words) == 1:
            assert words[0] in (*VERBS, "VERB"), f"there is no verb {words[0]!r}"
            return
    verb = " ".join(words[:2]) if " ".join(words[:2]) in VERBS else words[0]
    rest = words[len(verb.split()) :]
    assert verb in VERBS, f"there is no verb {verb!r}"
    module = importlib.import_module(VERBS[verb][0])
    with pytest.MonkeyPatch.context() as patch:
        # Before `--`, after which a study takes all words for those of its cells.
        end = rest.index("--") if "--" in rest else len(rest)
        shown = ["--cfg", "job"] if verb in CONFIGURED else []
        patch.setattr(sys, "argv", [verb, *rest[:end], *shown, *rest[end:]])
        if verb in CONFIGURED:
            module.main()
            return
        parse = argparse.ArgumentParser.parse_args

        def parse_alone(self: argparse.ArgumentParser, *arguments: object) -> None:
            parse(self, *arguments)  # type: ignore[call-overload]
            raise UnderstoodError

        patch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
        with pytest.raises(UnderstoodError):
            module.main()


def check_extras(words: Iterable[str]) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        assert not word.startswith("ssl-pipeline"), "no index has it: pip install -e '.[…]' in a clone"
        asked = re.fullmatch(r"\.\[(.+)\]", word)
        assert not asked or set(asked[1].split(",")) <= set(known)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: shlex.join(command.words))
def test_its_program_understands_it(command: Command) -> None:
    check(command)  # a verb leaves with exit code 2 where it does not


@pytest.mark.parametrize(
    "words",
    [
        "ssl-pipeline pretrian", "ssl-pipeline pretrain pretext=simclear", "ssl-pipeline pretrain epochs=-1",
        "ssl-pipeline export runs/model --too onnx", "accelerate launch --config_file launch/nowhere.yaml launch/pretrain",
        "bash launch/nowhere.sh", "pip install -e .[nowhere]", "pip install ssl-pipeline[timm]", "make all",
    ],
)  # fmt: skip
def test_a_wrong_command_is_seen(words: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check(Command("", tuple(shlex.split(words)), None, whole=True))


# What makes a command small enough for a test, added at its end. The stem is the one that other libraries build.
SMALL_STUDY = 'common=["data=embedded","data.val=4000","labels.validation=0","regime.length=1 steps","regime.min_steps=0","size=16"]'
SMALL = {
    "pretrain": ["backbone.name=resnet18", "backbone.stem=imagenet", "transform.size=32", "batch_size=4", "steps=2", "evaluate_every=0 steps", "tracking=off",
                 "num_workers=0", "optim.warmup=0 steps"],
    "finetune": ["backbone.name=resnet18", "backbone.stem=imagenet", "regime.length=1 steps", "regime.min_steps=0", "regime.probe.length=1 steps",
                 "regime.probe.min_steps=0", "labels.per_class=null", "regime.batch_size=4", "seeds=2", "tracking=off", "num_workers=0"],
    "evaluate": ["metrics=[knn,probe]", "knn.k=[1,3]", "probe.epochs=1", "probe.lrs=[0.1]", "size=16"],
    "plot-views": ["rows=2", "epochs=1", "transform.size=16"],
    "neighbors": ["k=3"],
    "study": ["seeds=2", "knn=false", "jobs=1", SMALL_STUDY],
}  # fmt: skip


def run(words: tuple[str, ...], patch: pytest.MonkeyPatch) -> None:
    """A command of ours in this process, with what makes it small."""
    program, verb, *rest = words
    assert program == "ssl-pipeline"
    images = [str(path) for path in sorted(Path("new_photos").iterdir())]
    filled = [part for word in rest for part in (images if word == "IMAGES" else [word])]
    small = [
        word for word in SMALL.get(verb, []) if not (word.startswith("metrics=") and any("metrics=" in w for w in rest))
    ]
    patch.setattr(sys, "argv", [verb, *filled, *small])
    importlib.import_module(VERBS[verb][0]).main()


def commands(page: str) -> list[Command]:
    """The commands in blocks of a page that need neither a GPU nor a network."""
    found = [command for command in commands_of(ROOT / page) if command.whole and not command.needs]
    return [command for command in found if command.words[0] == "ssl-pipeline"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the guides speak of, and where they are followed."""
    color_folder(tmp_path / "labeled", 8)
    (tmp_path / "photos").mkdir()
    (tmp_path / "new_photos").mkdir()
    for i, path in enumerate(sorted((tmp_path / "labeled").rglob("*.png"))):
        shutil.copyfile(path, tmp_path / "photos" / f"{i:02d}.png")
    for i in range(2):
        shutil.copyfile(tmp_path / "photos" / f"{i:02d}.png", tmp_path / "new_photos" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tutorial_runs_from_top_to_bottom(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {}
    for command in commands("docs/tutorial.md"):
        run(command.words, monkeypatch)
        told[command.words[1]] = capsys.readouterr().out
    assert "24" in told["prepare"]
    assert (place / "views.png").is_file()
    assert (place / "runs" / "photos" / "encoder.safetensors").is_file()
    assert (place / "runs" / "scratch" / "results.json").is_file()
    assert len(told["predict"].splitlines()) == 3  # a head, and one line a photo
    exported = {path.name for path in (place / "runs" / "model" / "exports").iterdir()}
    assert exported >= {"model_preprocessing.onnx", "encoder_torchvision.safetensors"}


def two_runs(place: Path, patch: pytest.MonkeyPatch) -> None:
    """The runs that pages take up."""
    for command in commands("docs/tutorial.md"):
        if command.words[1] in ("pretrain", "finetune") and "regime=scratch" not in command.words:
            run(command.words, patch)
    shutil.copyfile(place / "photos" / "00.png", place / "query.jpg")
    network = resnet18()
    network.fc = nn.Identity()
    torch.save({"state_dict": network.state_dict()}, place / "lightly.ckpt")


def what_tasks_read(place: Path) -> None:
    """Masks, boxes and a table, as the page of downstream tasks names them."""
    mask_folder(place / "scenes", 24)
    box_folder(place, 24)
    table = number_table(place, 80, unknown=0)
    table.rename(place / "images.csv")
    (place / "images.csv").write_text((place / "images.csv").read_text().replace("square,circle", "day,people"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", ["README.md", "docs/quickstart.md", "docs/evaluate.md", "docs/export.md", "docs/downstream.md"]
)
def test_a_page_runs_from_top_to_bottom(page: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page not in ("README.md", "docs/quickstart.md"):
        two_runs(place, monkeypatch)
        what_tasks_read(place)
    if page == "docs/export.md":
        run(("ssl-pipeline", "export", "runs/model", "--to", "torch.export"), monkeypatch)
        monkeypatch.setattr(sys, "stdin", ["photos/00.png\n"])
    if page == "docs/downstream.md":
        monkeypatch.setitem(SMALL, "finetune", [*SMALL["finetune"], "size=32"])
    found = commands(page)
    assert found
    for command in found:
        run(command.words, monkeypatch)


RUN_HERE = {
    "docs/tutorial.md",
    "README.md",
    "docs/quickstart.md",
    "docs/evaluate.md",
    "docs/export.md",
    "docs/downstream.md",
}
# What stands in blocks elsewhere, and the test that runs it.
RUN_ELSEWHERE: dict[str, str] = {
    "bash launch/quickstart.sh": "tests/benchmarks/quickstart.py",
    "bash launch/test.sh": ".ci/run",
    "accelerate launch": "tests/distributed/test_processes.py",
    "ssl-pipeline prepare": "tests/unit/test_prepare.py",
    "ssl-pipeline report": "tests/integration/test_report_runs.py",
    "ssl-pipeline study domain": "tests/integration/test_domain_study.py",
    "ssl-pipeline study": "tests/integration/test_study.py",
    "ssl-pipeline pretrain data=fashion_domains": "tests/integration/test_domains.py",
    "ssl-pipeline finetune data=fashion_domains": "tests/integration/test_domains.py",
    "ssl-pipeline pretrain recipe=": "tests/contract/test_recipes.py",
}


def ran(command: Command) -> bool:
    elsewhere = next(
        (test for start, test in RUN_ELSEWHERE.items() if shlex.join(command.words).startswith(start)), None
    )
    assert elsewhere is None or (ROOT / elsewhere).is_file()
    of_ours = command.words[0] in ("ssl-pipeline", "accelerate", "bash")
    return bool(command.needs or elsewhere or not of_ours or command.page in RUN_HERE)


def test_each_command_in_a_block_is_run_or_marked() -> None:
    left = [str(command) for command in all_commands() if command.whole and not ran(command)]
    assert not left, "run these in a test, or mark them by <!-- needs a GPU --> or <!-- needs a network -->"
