"""Two real processes on the CPU, by gloo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ssl_pipeline.config.schema import names
from tests.ranks import TWO, ranks
from tests.runs import FEW_IMAGES, ROOT, TINY, command, forked

# Of loss and state where a loss divides by small deviations; the rounding there is the processor's own.
SINGLE_PRECISION = {"barlow_twins": (1e-5, 1e-3), "vicreg": (1e-6, 1e-5)}


@pytest.fixture(scope="module")
def against_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """How far two processes are from one with the whole batch, for each pretext task and each mutant."""
    out = tmp_path_factory.mktemp("tasks") / "out.json"
    done = ranks(2, "tests/distributed/every_task.py", out)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, float]] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("name", names("pretext"))
def test_loss_gradient_and_state_on_two_processes_equal_one_big_batch(
    name: str, against_one: dict[str, dict[str, float]]
) -> None:
    exact, single = against_one[f"{name} float64"], against_one[f"{name} float32"]
    assert exact["loss"] < 1e-12
    assert exact["state"] < 1e-12
    loss, state = SINGLE_PRECISION.get(name, (1e-6, 1e-6))
    assert single["loss"] < loss
    assert single["state"] < state


@pytest.mark.parametrize("name", ["simclr", "moco_v2", "swav", "barlow_twins"])
def test_micro_batches_on_two_processes_equal_one_big_batch(
    name: str, against_one: dict[str, dict[str, float]]
) -> None:
    found = against_one[f"two-pass {name}"]
    assert found["loss"] < 1e-12
    assert found["state"] < 1e-11


def test_keys_are_shuffled_over_processes_as_in_one(against_one: dict[str, dict[str, float]]) -> None:
    found = against_one["shuffled moco_v2"]
    assert found["loss"] < 1e-12
    assert found["state"] < 1e-12


@pytest.mark.parametrize("mutant", ["own-slice gradient", "divided by world", "labels not shifted", "self not masked"])
def test_a_common_mistake_is_noticed(mutant: str, against_one: dict[str, dict[str, float]]) -> None:
    assert against_one[f"mutant: {mutant}"]["state"] > 1e-4


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "run"
    done = forked(*TWO, "launch/pretrain", *TINY, "steps=3", "evaluate_every=3 steps", f"output={folder}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1  # one process speaks
    told = [line for line in done.stderr.splitlines() if "warning" in line.lower()]
    assert len(told) == len(set(told))
    return folder


def test_two_processes_make_one_run(two: Path) -> None:
    lines = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert "eval/knn" in lines[-1]


def test_finetune_on_two_processes_takes_it_on(two: Path, tmp_path: Path) -> None:
    words = [
        "tracking=off",
        FEW_IMAGES,
        "labels.per_class=5",
        "split=val",
        "regime.length=2 steps",
        "regime.min_steps=0",
        f"encoder={two}",
    ]
    done = ranks(2, "launch/finetune", *words, f"output={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_processes_that_do_not_come_are_missed(tmp_path: Path) -> None:
    done = command(
        "accelerate", "launch", "--cpu", "--num_processes", "2", "launch/pretrain", *TINY, f"output={tmp_path / 'run'}"
    )
    assert done.returncode != 0
    assert "2 processes were asked for" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_literal_form_works_from_inside_launch(tmp_path: Path) -> None:
    done = command(
        "accelerate", "launch", "pretrain", *TINY, "steps=1", f"output={tmp_path / 'run'}", cwd=ROOT / "launch"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "encoder.safetensors").is_file()


def test_the_cpu_is_used_where_there_is_no_gpu() -> None:
    from ssl_pipeline.engine.distributed import start_accelerator

    if not torch.cuda.is_available():
        assert start_accelerator().device.type == "cpu"
