"""The loop's parts: which parameters decay, what a step's rate is, and that a bad number stops before it does harm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ssl_pipeline.config.base import ConfigError, UserError
from ssl_pipeline.config.command import exit_with_error
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.engine.distributed import batchnorm_notes, check_all_learn
from ssl_pipeline.engine.loop import _due
from ssl_pipeline.engine.nonfinite import NonFiniteError
from ssl_pipeline.engine.optim import OptimConfig, build_optimizer
from ssl_pipeline.engine.task import StepOutput, Task
from ssl_pipeline.pretext.simclr import Config as SimCLRConfig
from ssl_pipeline.pretext.simclr import SimCLR
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.schedules import TrainProgress, parse_duration
from tests.contract.test_rooms import task_of
from tests.runs import tiny_pretrain


@pytest.fixture
def task() -> Task:
    return task_of("simclr")[0]


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_norms_and_biases_neither_decay_nor_are_scaled(task: Task, name: str) -> None:
    optimizer = build_optimizer(OptimConfig(name=name, weight_decay=0.1), task, 256)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decays) == len(list(task.parameters()))
    for parameter in task.parameters():
        assert decays[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0)


def test_lars_scales_by_the_trust_ratio(task: Task) -> None:
    config = OptimConfig(name="lars", lr=1.0, scaling="none", weight_decay=1e-12, momentum=0.0, trust_coefficient=0.001)
    optimizer = build_optimizer(config, task, 256)
    before = {n: p.detach().clone() for n, p in task.named_parameters()}
    for parameter in task.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    for name, parameter in task.named_parameters():
        moved = float((parameter.detach() - before[name]).norm())
        if parameter.ndim > 1:
            assert moved == pytest.approx(0.001 * float(before[name].norm()), rel=1e-3)
        else:
            assert moved == pytest.approx(3.0 * parameter.numel() ** 0.5, rel=1e-5)


def test_the_rate_scales_with_the_batch_and_follows_the_step(task: Task) -> None:
    config = OptimConfig(lr=0.1, scaling="linear", warmup=parse_duration("10 steps"), warmup_start_factor=0.5)
    optimizer = build_optimizer(config, task, 512)
    rates = [config.set_lr(optimizer.param_groups, TrainProgress(step, 100, 10)) for step in (0, 10, 99)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[1] == pytest.approx(0.2)
    assert rates[2] < 0.001
    assert all(group["lr"] == rates[2] for group in optimizer.param_groups)


def test_the_end_is_looked_at_once() -> None:
    assert [done for done in range(1, 102) if _due(done, 101, 25)] == [25, 50, 75, 101]
    assert [done for done in range(1, 11) if _due(done, 10, 0)] == []


def test_a_loss_that_is_no_number_stops_before_the_weights_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = SimCLR.objective
    seen: dict[str, torch.Tensor] = {}
    tasks: list[SimCLR] = []

    def breaks(self: SimCLR, embeddings: dict[str, torch.Tensor], batch: Batch) -> StepOutput:
        if batch.clock.step < 2:
            return objective(self, embeddings, batch)
        seen.update({n: p.detach().clone() for n, p in self.named_parameters()})
        tasks.append(self)
        return StepOutput(embeddings["view 0"].sum() * torch.nan)

    monkeypatch.setattr(SimCLR, "objective", breaks)
    with pytest.raises(NonFiniteError, match="step 2"):
        pretrain(tiny_pretrain(tmp_path / "run", "save_every=1 steps"))
    assert all(torch.equal(value, seen[name]) for name, value in tasks[0].named_parameters())
    assert (tmp_path / "run" / "checkpoints" / "step-000000002.pt").is_file()


def test_a_collapsing_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forget(self: SimCLR, batch: Batch) -> None:
        for parameter in self.encoder.parameters():
            parameter.data.zero_()

    monkeypatch.setattr(SimCLR, "after_step", forget)
    pretrain(tiny_pretrain(tmp_path / "run", "evaluate_every=4 steps"))
    assert "have collapsed" in capsys.readouterr().out


def test_mistakes_are_told_once_a_group_of_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, told in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as left:
            exit_with_error(UserError("the thing is wrong."))
        assert left.value.code == 2
        assert ("the thing is wrong." in capsys.readouterr().err) == told


def test_a_task_that_needs_other_views_is_told() -> None:
    assert SimCLRConfig.views_needed == 2
    with pytest.raises(ConfigError, match=r"transform\.num_views"):
        pretrain(tiny_pretrain(None, "transform.num_views=3"))


def test_too_little_gpu_memory_says_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(self: SimCLR, batch: Batch) -> dict[str, torch.Tensor]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SimCLR, "embed", too_much)
    with pytest.raises(ConfigError, match=r"32 samples a process: lower `micro_batch_size`"):
        pretrain(tiny_pretrain(tmp_path / "run"))


def test_batchnorm_of_several_processes_on_cpus_is_said() -> None:
    norms, cpu = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.device("cpu")
    (note,) = batchnorm_notes(norms, DistInfo(0, 2, cpu))
    assert "each of the 2 processes" in note
    assert batchnorm_notes(norms, DistInfo(0, 1, cpu)) == []
    assert batchnorm_notes(norms, DistInfo(0, 2, torch.device("cuda"))) == []
    assert batchnorm_notes(nn.GroupNorm(2, 4), DistInfo(0, 2, cpu)) == []


def test_what_several_processes_would_wait_for_is_named(task: Task) -> None:
    batch = task_of("simclr")[1]
    task.register_parameter("idle", torch.nn.Parameter(torch.zeros(3)))
    task(batch).loss.backward()
    with pytest.raises(ConfigError, match="the loss does not depend on idle, and several processes"):
        check_all_learn(task)
    task.get_parameter("idle").requires_grad_(False)
    check_all_learn(task)
