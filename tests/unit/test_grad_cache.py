"""Micro-batches with the gradient of the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.engine.distributed import start_accelerator
from ssl_pipeline.engine.task import StepOutput, Task
from ssl_pipeline.engine.train_state import two_pass
from ssl_pipeline.pretext._base import ProjectionTask
from ssl_pipeline.pretrain import pretrain
from tests.runs import tiny_pretrain
from tests.tasks import as_group_norm, tiny_batch, tiny_task


def reseed(number: int) -> None:
    torch.manual_seed(number)


def gradients(task: Task, micro: int | None) -> tuple[StepOutput, dict[str, Tensor]]:
    batch = tiny_batch(task, 2, 8, 0)
    batch.views = [view.double() for view in batch.views]
    if micro is None:
        torch.manual_seed(0)
        output = task(batch)
        output.loss.backward()
    else:
        output = two_pass(task, task, batch, micro, start_accelerator(), reseed)
    return output, {n: p.grad for n, p in task.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro", [2, 4])
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("simclr", ["pretext.temperature.learned.min=0.05"]),
        ("moco_v2", ["pretext.symmetric=true"]),
        ("nnclr", []),
        ("swav", ["pretext.freeze_prototypes=0 steps"]),
        ("barlow_twins", []),
        ("vicreg", []),
        ("dino", []),
        ("rotation", []),
    ],
)
def test_the_gradient_is_that_of_the_whole_batch(name: str, overrides: list[str], micro: int) -> None:
    whole, parts = (as_group_norm(tiny_task(name, overrides)[0]).double() for _ in range(2))
    assert isinstance(whole, Task)
    assert isinstance(parts, Task)
    expected, wanted = gradients(whole, None)
    found, given = gradients(parts, micro)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    assert set(given) == set(wanted)
    for key, gradient in wanted.items():
        torch.testing.assert_close(given[key], gradient, rtol=1e-9, atol=1e-12)


def test_plain_micro_batches_would_give_another_gradient() -> None:
    """What the two-pass form is for: the negatives of a micro-batch are not those of the batch."""
    whole, parts = (as_group_norm(tiny_task("simclr")[0]).double() for _ in range(2))
    assert isinstance(whole, Task)
    assert isinstance(parts, Task)
    _, wanted = gradients(whole, None)
    batch = tiny_batch(parts, 2, 8, 0)
    batch.views = [view.double() for view in batch.views]
    for part in batch.split(4):
        (parts(part).loss / 2).backward()
    key = "projection.layers.0.weight"
    grad = dict(parts.named_parameters())[key].grad
    assert grad is not None
    assert float((grad - wanted[key]).norm() / wanted[key].norm()) > 0.05


def test_both_passes_drop_the_same_units() -> None:
    """With another mask in the second pass, the gradient would be one of no function."""
    first, second = (as_group_norm(tiny_task("simclr")[0]).double() for _ in range(2))
    for task in (first, second):
        assert isinstance(task, ProjectionTask)
        task.projection = nn.Sequential(nn.Dropout(0.5), task.projection)
    assert isinstance(first, Task)
    assert isinstance(second, Task)
    batch = tiny_batch(first, 2, 8, 0)
    batch.views = [view.double() for view in batch.views]
    two_pass(first, first, batch, 4, start_accelerator(), reseed)
    embedded = []
    for number, part in enumerate(batch.split(4)):
        torch.manual_seed(number)
        embedded.append(second.embed(part))
    whole = {name: torch.cat([piece[name] for piece in embedded]) for name in embedded[0]}
    second.objective(whole, batch).loss.backward()
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert one.grad is not None, name
        assert other.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_running_statistics_move_once_a_micro_batch() -> None:
    task, batch = tiny_task("simclr")
    other, _ = tiny_task("simclr")
    two_pass(task, task, batch, 4, start_accelerator(), reseed)
    for part in batch.split(4):
        other(part)
    norms = [[m for m in one.modules() if isinstance(m, nn.BatchNorm2d)] for one in (task, other)]
    for norm, expected in zip(*norms, strict=True):
        assert norm.track_running_stats
        assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), expected.buffers(), strict=True))


def test_a_run_with_micro_batches_and_one_that_does_not_divide(tmp_path: object) -> None:
    folder = pretrain(tiny_pretrain(None, f"output={tmp_path}/run", "micro_batch_size=8", "steps=2"))
    assert (folder / "encoder.safetensors").is_file()
    with pytest.raises(ConfigError, match=r"`micro_batch_size` of 12 does not divide the 32 images"):
        pretrain(tiny_pretrain(None, f"output={tmp_path}/other", "micro_batch_size=12", "steps=2"))
