"""Half precision as far as a CPU shows it: networks in bf16 or fp16, losses, weights and state in fp32."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from ssl_pipeline.config.schema import names
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.engine.distributed import start_accelerator
from ssl_pipeline.engine.loop import fit
from ssl_pipeline.engine.optim import OptimConfig, build_optimizer
from ssl_pipeline.engine.task import Task
from ssl_pipeline.engine.train_state import TrainState
from ssl_pipeline.losses.info_nce import two_view_info_nce
from ssl_pipeline.pretext.nnclr import NNCLR
from tests.tasks import Recorder, tiny_batch, tiny_task
from tests.unit.test_adaptation import prime, tiny_batches, tiny_method
from tests.unit.test_consistency import step_of
from tests.unit.test_consistency import tiny as tiny_consistency

HALVES = [torch.bfloat16, torch.float16]


def loss_and_gradients(name: str, half: torch.dtype | None) -> tuple[Tensor, list[Tensor], set[torch.dtype]]:
    """One step's, from the same start, and the types of the embeddings."""
    task, batch = tiny_task(name)
    task.eval()  # BatchNorm over eight samples would blow rounding up
    with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
        embeddings = task.embed(batch)
        loss = task.objective(embeddings, batch).loss
    loss.backward()
    gradients = [parameter.grad for parameter in task.parameters() if parameter.grad is not None]
    return loss.detach(), gradients, {rows.dtype for rows in embeddings.values()}


@pytest.mark.parametrize("half", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", names("pretext"))
def test_the_network_runs_in_half_and_the_loss_in_fp32(name: str, half: torch.dtype) -> None:
    wanted, exact, _ = loss_and_gradients(name, None)
    loss, gradients, types = loss_and_gradients(name, half)
    assert half in types  # the network
    assert loss.dtype == torch.float32
    assert float((loss - wanted).abs() / wanted.abs().clamp_min(0.1)) < 0.05
    assert len(gradients) == len(exact)
    assert all(gradient.dtype == torch.float32 and bool(gradient.isfinite().all()) for gradient in gradients)


def other_objectives() -> dict[str, tuple[Task, Batch]]:
    """Of stage two, as far as no network is part of the objective, and across domains."""
    found: dict[str, tuple[Task, Batch]] = {}
    for name in names("domain"):
        task, config, target = tiny_method(name)
        prime(task, target)
        batches = list(tiny_batches(config, target).from_step(0))
        found[name] = task.eval(), batches[1]
    consistency = tiny_consistency(3)
    return found | {"consistency": (consistency.eval(), step_of(consistency, 2, step=1))}


def same_in_half(task: Task, batch: Batch) -> None:
    """The objective of the same rows; bf16 would change its third digit, and with it which neighbor is the nearest."""
    embeddings = {key: rows.detach() for key, rows in task.embed(batch).items()}
    wanted = task.objective(embeddings, batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        found = task.objective(embeddings, batch).loss
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", names("pretext"))
def test_autocast_does_not_reach_a_pretext_objective(name: str) -> None:
    task, _ = tiny_task(name, ["pretext.queue=16", "pretext.queue_start=0 steps"] if name == "swav" else [])
    batches = [tiny_batch(task, 2, 8, step) for step in range(2)]
    task.eval()
    with torch.no_grad():
        task(batches[0])
        task.after_step(batches[0])  # so that queues and memories have rows
        same_in_half(task, batches[1])


def test_autocast_does_not_reach_an_objective_of_stage_two() -> None:
    for name, (task, batch) in other_objectives().items():
        with torch.no_grad():
            same_in_half(task, batch)
        assert name


def test_the_nearest_of_much_alike_rows_is_found_in_half_too() -> None:
    """Features of an early network: at a mean cosine of 0.9 bf16 cannot tell many of them apart."""
    task, _ = tiny_task("nnclr", ["pretext.projection_width=64", "pretext.queue=512"])
    assert isinstance(task, NNCLR)
    generator = torch.Generator().manual_seed(0)
    support, rows = (torch.randn(count, 64, generator=generator) + 3 for count in (512, 64))
    task.queue.push(support, torch.arange(512))
    with torch.autocast("cpu", torch.bfloat16):
        found = task.nearest(rows)
    nearest = (F.normalize(rows.double(), dim=1) @ F.normalize(support.double(), dim=1).T).argmax(1)
    torch.testing.assert_close(found, F.normalize(support[nearest], dim=1))


@pytest.mark.parametrize("half", HALVES, ids=["bf16", "fp16"])
def test_info_nce_of_half_rows_is_that_of_the_same_rows_in_fp32(half: torch.dtype) -> None:
    """At a small temperature: exp(1 ÷ 0.01) overflows in fp16, and logits in bf16 have two digits."""
    first, second = (torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)).to(half) for seed in (0, 1))
    with torch.autocast("cpu", half):
        found = two_view_info_nce(first, second, 0.01)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, two_view_info_nce(first.float(), second.float(), 0.01))


def test_a_scaled_step_that_overflows_is_left_out_and_the_next_is_made() -> None:
    task, batch = tiny_task("simclr")
    optimizer = build_optimizer(OptimConfig(), task, 8)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = [parameter.detach().clone() for parameter in task.parameters()]

    def step(factor: float) -> None:
        with torch.autocast("cpu", torch.float16):
            loss = task(batch).loss
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    step(1e38)
    assert all(torch.equal(parameter, old) for parameter, old in zip(task.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**15
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    step(1.0)
    moved = [not torch.equal(parameter, old) for parameter, old in zip(task.parameters(), before, strict=True)]
    assert any(moved)
    assert all(bool(parameter.isfinite().all()) for parameter in task.parameters())


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The launcher asked for bf16."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class _Batches:
    """Three steps over one batch."""

    total_steps, seed, unreadable, num_workers, offset = 3, 0, 0, 0, 0

    def __init__(self, task: nn.Module) -> None:
        self._task = task

    def from_step(self, start: int) -> Iterator[object]:
        for step in range(start, self.total_steps):
            yield tiny_batch(self._task, 2, 8, step)  # type: ignore[arg-type]

    def new_errors(self) -> dict[str, str]:
        return {}

    def check_bad_files(self) -> None:
        assert not self.new_errors()


@pytest.mark.usefixtures("bf16")
def test_the_loop_in_bf16_keeps_weights_and_state_in_fp32() -> None:
    accelerator = start_accelerator()
    assert accelerator.mixed_precision == "bf16"
    task, _ = tiny_task("byol")
    optim, recorder = OptimConfig(name="adamw", grad_clip_norm=1.0), Recorder()
    optimizer = build_optimizer(optim, task, 8)
    fit(TrainState(task, optimizer, optim, accelerator), _Batches(task), [recorder])  # type: ignore[arg-type]
    losses = [metrics["train/loss"] for metrics in recorder.metrics.values()]
    assert len(losses) == 3
    assert all(math.isfinite(value) for value in losses)
    kinds = {value.dtype for value in task.state_dict().values() if value.is_floating_point()}
    kinds |= {
        entry.dtype for state in optimizer.state.values() for entry in state.values() if entry.is_floating_point()
    }
    assert kinds == {torch.float32}
