"""What two processes saved one goes on from, and the reverse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.elastic import BATCH, DTYPES, STEPS, STOP, take_on, train
from tests.ranks import ranks


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Per dtype the runs of one and of two processes, and those that took on the state of another."""
    root = tmp_path_factory.mktemp("elastic")
    for name, dtype in DTYPES.items():
        train(root / name / "one", dtype)
        take_on(root / name / "one", root / name / "one_then_two")
    done = ranks(2, "tests/distributed/elastic.py", root)
    assert done.returncode == 0, done.stderr[:3000]
    for name, dtype in DTYPES.items():
        take_on(root / name / "two", root / name / "two_then_one")
        train(root / name / "two_then_one", dtype)
    return root


def state(run: Path, done: int) -> dict[str, torch.Tensor]:
    """Weights, teacher, queue, temperature, and the optimizer's momentum."""
    found: dict[str, Any] = torch.load(run / f"step-{done:09d}.pt", weights_only=True)
    momentum = {f"momentum {i}": one["momentum_buffer"] for i, one in found["optimizer"]["state"].items()}
    return {**found["task"], **momentum}


def distance(found: Path, wanted: Path, done: int) -> float:
    first, second = state(found, done), state(wanted, done)
    assert first.keys() == second.keys()
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)


def told(run: Path) -> tuple[dict[int, list[int]], dict[int, float]]:
    """Each step's samples over all processes, in their order, and rate."""
    notes = [json.loads(file.read_text()) for file in sorted(run.glob("seen-*.json"))]
    samples = {int(step): [i for note in notes for i in note["samples"][step]] for step in notes[0]["samples"]}
    return samples, {int(done): rate for done, rate in notes[0]["rates"].items()}


@pytest.mark.parametrize(("found", "wanted"), [("two_then_one", "two"), ("one_then_two", "one")])
def test_another_number_of_processes_goes_on_with_the_same_steps(root: Path, found: str, wanted: str) -> None:
    samples, rates = told(root / "double" / found)
    all_samples, all_rates = told(root / "double" / wanted)
    assert list(samples) == list(range(STOP, STEPS))
    assert all(len(ids) == BATCH for ids in samples.values())
    assert samples == {step: all_samples[step] for step in samples}
    assert rates == {done: all_rates[done] for done in rates}
    assert distance(root / "single" / found, root / "single" / wanted, STOP + 1) < 1e-6
    assert distance(root / "double" / found, root / "double" / wanted, STEPS) < 1e-9
    assert distance(root / "double" / found, root / "double" / wanted, STEPS) > 0  # they did reduce in another order


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_number_of_processes_goes_on_to_the_same_bits(root: Path, dtype: str) -> None:
    assert distance(root / dtype / "two_then_two", root / dtype / "two", STEPS) == 0
