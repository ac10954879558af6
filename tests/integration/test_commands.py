"""The real commands in processes of their own: what they print, and the code they leave."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, TINY, command, ssl_pipeline


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
    shown = ssl_pipeline("pretrain", "--cfg", "job", "views.size=20", cwd=tmp_path)
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
    (mine / "views").mkdir(parents=True)
    (mine / "views" / "tiny.yaml").write_text("size: 10\ncount: 2\n")
    words = [w for w in TINY if not w.startswith("views.size")]
    done = command(
        sys.executable, "-m", "ssl_pipeline.pretrain", *words, "steps=2", "views=tiny", "--config-dir", mine,
        "output=run", cwd=work, PYTHONPATH=str(target),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    card = json.loads((work / "run" / "card.json").read_text())
    assert card["blueprint"]["size"] == 10
    assert {path.name for path in work.iterdir()} == {"run"}  # no Hydra folders, no change of directory


def test_readme_names_no_command_that_is_not_there() -> None:
    text = (ROOT / "README.md").read_text()
    verbs = set(re.findall(r"^ssl-pipeline ([a-z]+)", text, flags=re.MULTILINE))
    from ssl_pipeline.cli import VERBS

    assert verbs
    assert verbs <= set(VERBS)
    for script in re.findall(r"bash (launch/\S+\.sh)", text):
        assert (ROOT / script).is_file()
