"""The report of folders that are broken, going, killed or none: a page that says so, or a sentence."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.report.command import main, report, watch
from ssl_pipeline.report.page import page
from ssl_pipeline.report.read import read_runs
from tests.report_page import Page, blind, refresh
from tests.report_runs import write_finetune, write_pretrain, write_study


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Another process is in the folder, as a run would be."""
    code = (
        "import sys; from pathlib import Path; from ssl_pipeline.logging.lock import FolderLock;"
        "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield
        holder.communicate("")


def test_a_run_that_is_going_and_one_that_was_killed(tmp_path: Path) -> None:
    folder = write_pretrain(tmp_path / "run", card=False)
    with held(folder):
        (run,) = read_runs([folder])
        assert run.state == "running"
        text = page([run], refresh=7, images=blind)
        assert refresh(text) == 7
        assert "trains small_resnet" in Page(text).text
    (run,) = read_runs([folder])
    assert run.state == "stopped"
    assert "was stopped before its end" in Page(page([run], images=blind)).text


def _without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _with(name: str, content: str | bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(("break_it", "told"), [
    (_with("metrics.jsonl", '{"step": 1, "pretrain/loss": 3.0}\n{"step": 2, "pre'), r"1 broken line\(s\) of metrics.jsonl"),
    (_with("metrics.jsonl", ""), "holds no figure yet"),
    (_with("metrics.jsonl", b"\xff\xfe\x00"), "broken line"),
    (_with("metrics.jsonl", '{"step": 1, "time": "late", "pretrain/loss": 1, "pretrain/lr": [1], "pretrain/epoch": "x"}\n'), "simclr|SimCLR"),
    (_without("metrics.jsonl"), "no figure was logged"),
    (_without("card.json"), "stopped before its end"),
    (_with("card.json", "{"), "card.json is damaged"),
    (_with("card.json", "[]"), "stopped before its end"),
    (_without("run.json"), "—"),
    (_with("run.json", '{"starts": [3, {"started": 5}]}'), "—"),
    (_with("config.yaml", "a: [1"), "config.yaml can't be read"),
    (_with("config.yaml", b"\xff\xfe\x00\x01"), "config.yaml can't be read"),
    (_with("config.yaml", "- 1"), "can't be read"),
    (_with("encoder.safetensors", "x"), "does not understand its config.yaml"),
])  # fmt: skip
def test_a_broken_run_gives_a_page_that_says_so(tmp_path: Path, break_it: Any, told: str) -> None:
    folder = write_pretrain(tmp_path / "run")
    break_it(folder)
    path, _ = report([folder])
    assert re.search(told, Page(path.read_text()).text)


@pytest.mark.parametrize(
    ("figures", "study"), [(3, {}), ([1, {"accuracy": "x"}], {"rows": 3}), ([], {"rows": [{}, 1]})]
)
def test_records_of_another_shape_give_a_page(tmp_path: Path, figures: Any, study: Any) -> None:
    folder = write_finetune(tmp_path / "run", [0.5], figures=figures, confusion={"matrix": [[1, 2]]})
    (folder / "domain.json").write_text('{"rows": [3, {"figures": {}}]}')
    report([folder, write_study(tmp_path / "study", study)], tmp_path / "page.html")
    assert "nothing is measured yet" in Page((tmp_path / "page.html").read_text()).text


def test_what_can_not_be_a_report_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for wrong in ("empty", "nowhere"):
        with pytest.raises(ConfigError, match=f"{wrong}' holds no run"):
            report([tmp_path / wrong])
    run = write_pretrain(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"end it in \.html"):
        report([run], tmp_path / "page.txt")
    with pytest.raises(ConfigError, match="there is no folder"):
        report([run], tmp_path / "gone" / "page.html")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "empty")])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2


def test_a_folder_of_runs_stands_for_them_and_each_stands_once(tmp_path: Path) -> None:
    write_pretrain(tmp_path / "one" / "pretrain")
    write_pretrain(tmp_path / "two" / "pretrain")
    runs = read_runs([tmp_path / "one", tmp_path / "two", tmp_path / "one" / "pretrain"])
    assert [run.name for run in runs] == ["one/pretrain", "two/pretrain"]


def test_watching_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pretrain(tmp_path / "run", card=False)
    pages: list[int | None] = []

    def sleep(seconds: float) -> None:
        pages.append(refresh((folder / "report.html").read_text()))
        if len(pages) == 2:
            (folder / "card.json").write_text('{"kind": "encoder"}')
        assert seconds == 3

    monkeypatch.setattr("time.sleep", sleep)
    with held(folder):
        path = watch([folder], None, 3)
    assert pages == [3, 3]
    assert refresh(path.read_text()) is None
