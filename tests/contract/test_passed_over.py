"""A step whose loss or gradient is not finite changes nothing, in any task of either stage, and the next step is taken."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from ssl_pipeline.config.schema import names
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.downstream import detection, multi_label, regression, segmentation
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.engine.distributed import start_accelerator
from ssl_pipeline.engine.nonfinite import NonFiniteConfig, NonFiniteError
from ssl_pipeline.engine.optim import OptimConfig, build_optimizer
from ssl_pipeline.engine.task import StepOutput, Task
from ssl_pipeline.engine.train_state import TrainState
from ssl_pipeline.schedules import TrainProgress
from tests.tasks import tiny_batch, tiny_task
from tests.unit.test_adaptation import prime, tiny_batches, tiny_method
from tests.unit.test_consistency import step_of
from tests.unit.test_consistency import tiny as tiny_consistency
from tests.unit.test_downstream_vector import encoder

Case = tuple[Task, list[Batch]]
# So that queues and centers are in use from the first step on, and nothing that could move is frozen.
IN_USE = {
    "swav": ["pretext.queue=16", "pretext.queue_start=0 steps", "pretext.freeze_prototypes=0 steps"],
    "dino": ["pretext.freeze_prototypes=0 steps"],
    "simclr": ["pretext.temperature.learned.min=0.05"],
    "moco_v3": ["pretext.temperature.learned.min=0.05"],
}


class Steps:
    """What the loop asks of batches: their seed, and a state to keep."""

    seed = offset = 0

    def position(self, step: int) -> dict[str, int]:
        return {"step": step}

    def new_errors(self) -> dict[str, Any]:
        return {}

    def merge_errors(self, found: Sequence[Any]) -> None:
        del found

    def state_dict(self) -> dict[str, Any]:
        return {}

    load_state_dict = merge_errors


def pretext_case(name: str) -> Case:
    task, first = tiny_task(name, IN_USE.get(name, ()))
    return task, [tiny_batch(task, len(first.views), 8, step) for step in range(3)]


def dense_case(name: str) -> Case:
    torch.manual_seed(0)
    task: Task
    target: Any
    if name == "segmentation":
        task, target = segmentation.Config(name=name).build(encoder(), 3), torch.randint(0, 3, (4, 32, 32))
    else:
        words: dict[str, Any] = {
            "head": name,
            "width": 8,
            "hidden": 8,
            "rpn_post_nms_top_n": 20,
            "box_batch_size_per_image": 8,
        }
        task = detection.Config(name="detection", **words).build(encoder(), 2)
        box = {"boxes": torch.tensor([[4.0, 4, 20, 20]]), "labels": torch.tensor([1])}
        target = [box] * 4
    clocks = [TrainProgress(step, 10, 1) for step in range(3)]
    return task, [Batch(clock, torch.arange(4), [torch.randn(4, 3, 32, 32)], target=target) for clock in clocks]


def vector_case(name: str) -> Case:
    if name == "consistency":
        consistency = tiny_consistency(3)
        return consistency, [step_of(consistency, 2, step, seed=step) for step in range(3)]
    task: Task = {"regression": regression, "multi_label": multi_label}[name].Config(name=name).build(encoder(), 2)
    target = torch.randint(0, 2, (6, 2)).float()
    clocks = [TrainProgress(step, 10, 1) for step in range(3)]
    return task, [Batch(clock, torch.arange(6), [torch.randn(6, 3, 16, 16)], target=target) for clock in clocks]


def domain_case(name: str) -> Case:
    task, config, target = tiny_method(name)
    prime(task, target)
    return task, list(tiny_batches(config, target).from_step(0))[:3]


CASES: dict[str, tuple[Callable[[str], Case], str]] = {
    **{f"pretext {name}": (pretext_case, name) for name in names("pretext")},
    **{f"downstream {name}": (dense_case, name) for name in ("segmentation", "faster_rcnn", "retinanet")},
    **{f"downstream {name}": (vector_case, name) for name in ("regression", "multi_label", "consistency")},
    **{f"domain {name}": (domain_case, name) for name in names("domain")},
}


def everything(task: Task, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a step could move: parameters, buffers (those that are not saved, too), and the optimizer's state."""
    found = {**dict(task.named_parameters()), **dict(task.named_buffers()), **task.state_dict()}
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        found |= {f"{number} {key}": torch.as_tensor(value) for key, value in optimizer.state[parameter].items()}
    return {key: value.detach().clone() for key, value in found.items()}


def broken_pixel(batch: Batch, view: int) -> Batch:
    """One image of a view is no number."""
    views = [images.clone() for images in batch.views]
    views[view][1, :, 2] = torch.nan
    bad = copy.copy(batch)
    bad.views = views
    return bad


def with_broken_gradient(task: Task, at: int) -> None:
    """At one step the loss is right, and its gradient is 0 · ∞."""
    right = task.objective

    def objective(embeddings: dict[str, Tensor], batch: Batch) -> StepOutput:
        output = right(embeddings, batch)
        if batch.clock.step == at:
            rows = next(value for value in embeddings.values() if value.requires_grad)
            output.loss = output.loss + (rows * 0).sum().sqrt()
        return output

    task.objective = objective  # type: ignore[method-assign]


def training_of(
    task: Task, action: Literal["skip", "stop"], micro: int | None, checkpoints: Checkpoints | None = None
) -> tuple[TrainState, torch.optim.Optimizer]:
    optim = OptimConfig(
        name="adamw", lr=0.01, scaling="none", grad_clip_norm=1.0, nonfinite=NonFiniteConfig(action=action)
    )
    optimizer = build_optimizer(optim, task, 8)
    steps: Any = Steps()
    state = TrainState(task, optimizer, optim, start_accelerator(), checkpoints, micro=micro)
    state.start(steps)
    return state, optimizer


def check_passes_over(case: Case, micro: int | None, view: int | None) -> None:
    task, (first, bad, third) = copy.deepcopy(case)
    if view is None:
        with_broken_gradient(task, at=bad.clock.step)
    else:
        bad = broken_pixel(bad, view)
    training, optimizer = training_of(task, "skip", micro)
    training.step(first)
    before = everything(task, optimizer)
    training.step(bad)
    after = everything(task, optimizer)
    assert training.skipped == 1, f"view {view}"
    assert set(after) == set(before)
    moved = [key for key, value in before.items() if not torch.equal(value, after[key])]
    assert not moved, f"view {view}"
    step = training.step(third)
    assert training.skipped == 1, f"view {view}: the step after the bad one was not taken"
    assert torch.isfinite(step.output.loss)
    later = everything(task, optimizer)
    assert all(bool(torch.isfinite(value).all()) for value in later.values() if value.is_floating_point())
    assert any(not torch.equal(value, later[key]) for key, value in after.items())


@pytest.mark.parametrize("name", CASES)
def test_a_step_that_is_passed_over_moves_nothing(name: str) -> None:
    make, component = CASES[name]
    case = make(component)
    for view in (*range(len(case[1][0].views)), None):
        check_passes_over(case, None, view)
    if name.startswith("pretext"):  # stage two has no micro-batches
        for view in (0, None):
            check_passes_over(case, 4, view)


def test_a_step_that_the_gradient_scaler_passes_over_moves_nothing() -> None:
    task, first = tiny_task("moco_v2", ["pretext.temperature.value=0.01"])
    optimizer = build_optimizer(OptimConfig(lr=0.01), task, 8)
    accelerator, steps = start_accelerator(), Steps()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # the gradient overflows
    training = TrainState(task, optimizer, OptimConfig(lr=0.01), accelerator)
    training.start(steps)  # type: ignore[arg-type]
    before = everything(task, optimizer)
    training.step(first)
    assert training.skipped_by_scaler == 1
    assert all(torch.equal(value, before[key]) for key, value in everything(task, optimizer).items())


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_from_before_a_bad_step_is_that_state_and_finite(name: str, tmp_path: Path) -> None:
    make, component = CASES[name]
    task, (first, bad, _) = case = make(component)
    other = copy.deepcopy(case[0])
    with Checkpoints(tmp_path / "checkpoints", None, 2, main=True) as checkpoints:
        training, optimizer = training_of(task, "stop", None, checkpoints)
        training.step(first)
        before = everything(task, optimizer)
        with pytest.raises(NonFiniteError, match="step 1 gives no finite number"):
            training.step(broken_pixel(bad, 0))
        saved = checkpoints.load()
    assert saved is not None
    other.load_state_dict(saved["task"])
    for key, value in other.state_dict().items():
        assert torch.equal(value, before[key]), key
        assert not value.is_floating_point() or bool(torch.isfinite(value).all()), key
