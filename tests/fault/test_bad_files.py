"""One damaged file in ten: the run ends as it should, and each of them is named and counted once, whoever meets it when."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssl_pipeline.data.bad_files import BadFiles, parse_limit
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.image_files import FileDataset
from ssl_pipeline.data.loader import DistInfo, IndexedLoader
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.logging.jsonl import read_metrics
from ssl_pipeline.pretext.simclr import SimCLR
from ssl_pipeline.pretrain import pretrain
from tests.ranks import TWO
from tests.runs import TINY_ON_ANY_DATA, forked, tiny_pretrain
from tests.unit.test_loader import photos, views


class StoppedError(Exception):
    """The plug was pulled."""


def one_in_ten(folder: Path, count: int = 60) -> set[str]:
    """The damaged ones of a folder of photos: their headers are whole, so that no start finds them."""
    bad = {str(folder / name) for name in photos(folder, count)[3::10]}
    for name in bad:
        Path(name).write_bytes(Path(name).read_bytes()[:700])
    return bad


def words_of(folder: Path, steps: int) -> list[str]:
    return [
        *TINY_ON_ANY_DATA, "data=folder", f"data.path={folder}", "data.max_bad_files=10%", "batch_size=8", "num_workers=0", f"steps={steps}",
        "log_every=7", "save_every=90 steps",
    ]  # fmt: skip


def check_exact(run: Path, bad: set[str], said: str, starts: int = 1) -> None:
    counts = [line.get("system/bad_files", 0) for line in read_metrics(run)]
    assert counts == sorted(counts)
    assert counts[-1] == len(bad)
    saved = Checkpoints(run / "checkpoints").load()
    assert saved is not None
    assert saved["batches"]["bad_files"].keys() == bad
    assert all(1 <= said.count(f"{name} can't be read as an image") <= starts for name in bad)


def test_what_two_processes_and_two_starts_meet_counts_once(tmp_path: Path) -> None:
    bad = one_in_ten(tmp_path, 20)
    assert len(bad) == 2

    def batches(rank: int) -> IndexedLoader:
        names = sorted(path.name for path in tmp_path.glob("*.jpg"))
        source = FileDataset("photos", tmp_path, names, 3, bad_files=BadFiles(parse_limit("2"), 20))
        return IndexedLoader(source, views(8), 4, 0, DistInfo(rank, 2, torch.device("cpu")), 40, 0)

    both = [batches(rank) for rank in range(2)]
    for one in both:
        list(one.from_step(0))
        assert one.new_errors().keys() == bad
        assert one.unreadable == 2
    found = [one.new_errors() for one in both]
    for one in both:
        one.merge_errors(found)
        assert (one.unreadable, one.new_errors()) == (2, {})
        one.check_bad_files()
    again = batches(1)
    again.load_state_dict(both[0].state_dict())
    list(again.from_step(20))
    assert (again.unreadable, again.new_errors()) == (2, {})


@pytest.mark.parametrize("steps", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_and_continued(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad, run = one_in_ten(tmp_path / "photos"), tmp_path / "run"

    def stops(self: SimCLR, batch: Batch) -> None:
        if batch.clock.step == steps - 5:
            raise StoppedError

    with monkeypatch.context() as here:
        here.setattr(SimCLR, "after_step", stops)
        with pytest.raises(StoppedError):
            pretrain(tiny_pretrain(run, *words_of(tmp_path / "photos", steps)))
    pretrain(tiny_pretrain(run, *words_of(tmp_path / "photos", steps), "resume=auto"))
    check_exact(run, bad, caplog.text)


@pytest.mark.slow
def test_a_thousand_steps_on_two_processes(tmp_path: Path) -> None:
    bad, run = one_in_ten(tmp_path / "photos"), tmp_path / "run"
    done = forked(*TWO, "launch/pretrain", *words_of(tmp_path / "photos", 1000), f"output={run}")
    assert done.returncode == 0, done.stderr
    check_exact(run, bad, " ".join((done.stdout + done.stderr).split()))
