"""Every verb in a folder of any name, from the prepared images to the page: nothing is quoted but for the shell."""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
from pathlib import Path

import pytest

from ssl_pipeline import cli
from tests.pictures import color_folder

NAME = "x~ it's #1, [b] 日本 :x: {ä} (a=b) & 100% $X^$; !"
TINY = [
    "tracking=off", "tracking.log_images=false", "backbone.width=4", "num_workers=0", "transform.size=16",
]  # fmt: skip


class Shell:
    """The verbs as they are typed, in this process."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capture = patch, capture

    def __call__(self, *words: str) -> str:
        self._patch.setattr(sys, "argv", ["ssl-pipeline", *words])
        try:
            cli.main()
        except SystemExit as left:
            captured = self._capture.readouterr()
            raise AssertionError(f"{words} left with {left.code}: {captured.err}") from None
        return self._capture.readouterr().out


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    home = tmp_path / "home"
    color_folder(home / NAME, 14)
    work = tmp_path / f"work {NAME}"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("COLUMNS", "1000")
    return Shell(monkeypatch, capsys)


def test_a_tilde_before_no_users_name_is_answered(shell: Shell) -> None:
    with pytest.raises(AssertionError, match="`~/NAME` below the home folder"):
        shell("pretrain", "data=folder", "data.path=~photos", *TINY)


@pytest.mark.filterwarnings("ignore:Glyph")  # the plots' font has no Japanese
def test_all_verbs_in_folders_of_any_name(shell: Shell) -> None:
    photos, run, model, grid = f"~/{NAME}", f"runs/1e5/{NAME}", "2024", f"study {NAME}"
    said = shell("prepare", str(Path(photos).expanduser()))
    line = next(line for line in said.splitlines() if line.startswith("train: "))
    assert shlex.split(line.removeprefix("train: "))[-1] == f"data.path={Path(photos).expanduser()}"
    data = ["data=folder", f"data.path={photos}"]
    shell("plot-views", *data, "rows=2", "epochs=1", "transform.size=16", f"output={NAME}.png")
    assert Path(f"{NAME}.png").is_file()
    words = ["pretrain", *data, *TINY, "batch_size=8", "pretext.hidden_width=8", "pretext.projection_width=8", "optim.warmup=0",
             "evaluate_every=0 steps", f"output={run}"]  # fmt: skip
    shell(*words, "epochs=2")
    with pytest.raises(AssertionError, match="resume=auto"):
        shell(*words, "epochs=2")
    shell(*words, "epochs=2", "resume=auto")
    assert json.loads((Path(run) / "card.json").read_text())["config"]["data"]["path"] == photos
    shell("finetune", *data, *TINY[:4], f"encoder={run}", "regime=frozen", "regime.batch_size=4", f"output={model}")
    assert Path(model, "model.safetensors").is_file()
    folder = Path(photos).expanduser()
    found = list(csv.DictReader(io.StringIO(shell("predict", model, str(folder), "--format", "csv"))))
    assert {row["file"] for row in found} == {str(path) for path in folder.rglob("*.png")}
    shell("embed", run, *data, f"output={NAME}.npz")
    shell("neighbors", run, found[0]["file"], *data, "k=2", f"output=1e5 {NAME}.png")
    shell("evaluate", run, *data, "metrics=[knn]", "knn.k=[1]", f"output={NAME}.json")
    shell("export", model, "--to", "safetensors", f"--output=~/out {NAME}")
    assert (Path.home() / f"out {NAME}" / "card.json").is_file()
    shell("report", run, model, f"--output={NAME}.html")
    assert f"wrote {run}/temperature.svg" in shell("plot-temperature", run)
    shell(
        "study",
        run,
        "labels=[2]",
        "regimes=[frozen]",
        "seeds=1",
        "jobs=1",
        f"output={grid}",
        "--",
        *data,
        "labels.validation=0",
        "num_workers=0",
    )
    assert {Path(f"{NAME}.{kind}").is_file() for kind in ("npz", "json", "html")} == {True}
    assert Path(grid, "study.json").is_file()
    # Nothing was made beside what was named.
    made = {path.name for path in Path().iterdir()} - {f"{NAME}.{kind}" for kind in ("png", "npz", "json", "html")}
    assert made == {"runs", model, grid, f"1e5 {NAME}.png"}
