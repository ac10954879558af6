"""The memory of a step, estimated before it is taken: exact in what is kept, near in what a process then holds."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.schema import names
from ssl_pipeline.engine import memory
from ssl_pipeline.engine.memory import Memory, check_memory, estimate, kept_bytes
from ssl_pipeline.engine.task import Task
from tests.benchmarks import scale
from tests.runs import command
from tests.tasks import tiny_batch, tiny_task

GIB = 2**30


def step_bytes(
    task: Task, shapes: list[tuple[int, int, int]], images: int, micro: int | None = None, optimizer: str = "sgd"
) -> float:
    step = estimate(task, shapes, optimizer)
    assert step is not None
    return step.needed(images, micro)


@pytest.mark.parametrize("name", names("pretext"))
def test_what_is_kept_is_what_a_real_forward_keeps(name: str) -> None:
    """Of every pretext task: views without gradient, four rotations and a second network count as they are."""
    task, _ = tiny_task(name)
    batch = tiny_batch(task, 2, 8, 0)
    before = {key: value.clone() for key, value in task.state_dict().items()}
    shapes = [(view.shape[1], view.shape[2], view.shape[3]) for view in batch.views]
    counted = kept_bytes(task, shapes, 8)
    assert all(torch.equal(before[key], value) for key, value in task.state_dict().items())
    weights = {value.untyped_storage().data_ptr() for value in [*task.parameters(), *task.buffers()]}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embeddings = task.embed(batch)
    assert embeddings
    assert counted == sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_a_step_takes_what_was_estimated() -> None:
    """Measured in a process of its own: between the estimate and 1.3 times of it."""
    task, batch = scale._task(4, 16)
    shapes = [(view.shape[1], view.shape[2], view.shape[3]) for view in batch.views]
    estimated = step_bytes(task, shapes, 64)
    words = f"from tests.benchmarks import scale; scale.print_memory({64}, {16})"
    done = command(sys.executable, "-c", words, MALLOC_MMAP_THRESHOLD_="65536")
    measured = float(done.stdout.split()[1]) * 2**20
    estimated -= (
        64 * sum(channels * height * width for channels, height, width in shapes) * 5
    )  # the views were there before
    assert 1 <= measured / estimated <= 1.3


def test_what_does_not_grow_with_the_batch_counts_once() -> None:
    task, batch = scale._task(4, 16)
    shapes = [(view.shape[1], view.shape[2], view.shape[3]) for view in batch.views]
    sizes = {images: step_bytes(task, shapes, images) for images in (8, 16, 32)}
    assert sizes[32] - sizes[16] == pytest.approx(2 * (sizes[16] - sizes[8]))
    micro = step_bytes(task, shapes, 32, 8)
    assert sizes[8] < micro < sizes[16]  # the views of the whole share are there, too
    parameters = sum(parameter.numel() for parameter in task.parameters())
    adamw = step_bytes(task, shapes, 8, optimizer="adamw")
    assert adamw - sizes[8] == 4 * parameters


def test_too_large_a_step_is_refused_with_what_fits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task, batch = scale._task(4, 16)
    shapes = [(view.shape[1], view.shape[2], view.shape[3]) for view in batch.views]
    needed = step_bytes(task, shapes, 64)

    def machine(total: float, free: float) -> None:
        monkeypatch.setattr(memory, "machine_memory", lambda: Memory(total * needed, free * needed))

    machine(4, 2)
    check_memory(task, shapes, 64, None, "sgd", 1)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        check_memory(task, shapes, 64, None, "sgd", 3)  # of the total there would be enough
    assert "are free" in caplog.text
    machine(0.9, 0.6)
    with pytest.raises(ConfigError, match=r"needs about .* GiB of memory, .*: micro_batch_size=16\."):
        check_memory(task, shapes, 64, None, "sgd", 1)
    check_memory(task, shapes, 64, 16, "sgd", 1)
    machine(0.01, 0.01)
    with pytest.raises(ConfigError, match=r"lower `batch_size`"):
        check_memory(task, shapes, 64, None, "sgd", 1)


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container_counts(version: int, tmp_path: Path) -> None:
    limit, used = [("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")][version - 1]
    root = tmp_path / "cgroup"
    group = root / ("memory" if version == 1 else "") / "job" / "step"
    group.mkdir(parents=True)
    (group / limit).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    (group / used).write_text("5\n")
    (group.parent / limit).write_text(f"{4 * GIB}\n")
    (group.parent / used).write_text(f"{3 * GIB}\n")
    (group.parent / "memory.stat").write_text(f"anon 7\n{'total_' if version == 1 else ''}inactive_file {GIB}\n")
    own = tmp_path / "own"
    own.write_text("12:cpu:/x\n4:memory:/job/step\n" if version == 1 else "0::/job/step\n")
    assert list(memory._of_control_groups(root, own)) == [Memory(4 * GIB, 2 * GIB)]
    own.write_text("4:memory:/of/the/host\n" if version == 1 else "0::/of/the/host\n")
    base = root / ("memory" if version == 1 else "")
    (base / limit).write_text(f"{2 * GIB}\n")
    (base / used).write_text("0\n")
    assert list(memory._of_control_groups(root, own)) == [Memory(2 * GIB, 2 * GIB)]
    assert list(memory._of_control_groups(root, tmp_path / "absent")) == []
