"""Real processes, really killed, and continued to the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs import forked


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_end_as_if_nobody_had_stopped_them(kills: int, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    words = ["-m", "tests.benchmarks.faults", "--rounds", str(kills), "--json", str(figures)]
    done = forked(*words, seconds=3600)
    assert done.returncode == 0, done.stderr + done.stdout
    found = {name.removeprefix("faults."): value for name, value in json.loads(figures.read_text()).items()}
    assert found["kills"] == found["exact_resumes"] == kills
    assert found["most_steps_done_twice"] <= found["steps_between_checkpoints"]
