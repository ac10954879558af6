"""A loss or gradient that is no finite number: no process takes the step, and the state before it is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers.evo_norm import EvoNorm2dB0

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.engine.distributed import start_accelerator
from ssl_pipeline.engine.nonfinite import NonFiniteError
from ssl_pipeline.engine.task import StepOutput
from ssl_pipeline.engine.train_state import BatchNormSnapshot, gradient_check
from ssl_pipeline.evaluation.online import LossSpikes
from ssl_pipeline.finetune import finetune
from ssl_pipeline.logging.jsonl import read_metrics
from ssl_pipeline.pretext.simclr import SimCLR
from ssl_pipeline.pretrain import pretrain
from tests.ranks import ranks
from tests.runs import TINY, tiny_finetune, tiny_pretrain

EACH = ["save_every=1 steps", "optim.warmup=0 steps"]
embed, objective = SimCLR.embed, SimCLR.objective


def state(folder: Path, done: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "checkpoints" / f"step-{done:09d}.pt", weights_only=True)
    return found


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    moments = [state["optimizer"]["state"] for state in (first, second)]
    return all(torch.equal(value, second["task"][name]) for name, value in first["task"].items()) and all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(moments[1][place][name]))
        for place, values in moments[0].items()
        for name, value in values.items()
    )


def bad_sample(self: SimCLR, batch: Batch) -> dict[str, torch.Tensor]:
    """One sample's image is no number from step 2 on: all of BatchNorm's statistics follow."""
    if batch.clock.step >= 2:
        batch.views = [view.clone() for view in batch.views]
        batch.views[1][3] = torch.nan
    return embed(self, batch)


def bad_gradient(self: SimCLR, embeddings: dict[str, torch.Tensor], batch: Batch) -> StepOutput:
    """The loss is right, and its gradient is 0 · ∞."""
    output = objective(self, embeddings, batch)
    if batch.clock.step >= 2:
        output.loss = output.loss + (embeddings["view 0"] * 0).sum().sqrt()
    return output


@pytest.mark.parametrize(
    ("place", "broken", "told"),
    [
        ("embed", bad_sample, r"process 0 has a loss of nan \(1 sample\(s\), with images or embeddings"),
        ("objective", bad_gradient, r"process 0 has the gradient of encoder\."),
    ],
)
@pytest.mark.parametrize(
    "more", [[], ["optim.grad_clip_norm=1.0"], ["micro_batch_size=16"]], ids=["plain", "clipped", "two passes"]
)
def test_a_bad_step_stops_before_anything_is_changed(
    place: str, broken: Any, told: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if more == ["micro_batch_size=16"] and place == "embed":
        told = r"process 0 has a loss of nan"
    good = pretrain(tiny_pretrain(tmp_path / "good", *EACH, *more, "steps=3"))
    monkeypatch.setattr(SimCLR, place, broken)
    with pytest.raises(NonFiniteError, match=f"step 2 gives no finite number: {told}") as stopped:
        pretrain(tiny_pretrain(tmp_path / "bad", *EACH, *more, "steps=3", "save_every=100 steps"))
    assert stopped.value.exit_code == 1
    assert same(state(good, 2), state(tmp_path / "bad", 2))
    report = json.loads((tmp_path / "bad" / "nonfinite.json").read_text())
    assert report["step"] == 2
    assert len(report["processes"][0]["batch"]) == 32
    if place == "embed":
        assert report["processes"][0]["batch"][3] in report["processes"][0]["samples"]


def test_a_bad_first_step_of_stage_two_is_told_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = pretrain(tiny_pretrain(tmp_path / "one", "steps=1"))
    right = Classification.objective

    def no_number(self: Classification, embeddings: dict[str, torch.Tensor], batch: Batch) -> StepOutput:
        output = right(self, embeddings, batch)
        output.loss = output.loss * torch.nan
        return output

    monkeypatch.setattr(Classification, "objective", no_number)
    with pytest.raises(NonFiniteError, match="step 0 gives no finite number"):
        finetune(tiny_finetune(encoder, tmp_path / "two", "regime=end_to_end", "regime.length=2 steps"))
    assert list(tmp_path.glob("two/**/nonfinite.json"))


def test_bad_steps_are_passed_over_and_counted_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimCLR, "embed", bad_sample)
    words = [*EACH, "steps=6", "optim.nonfinite.action=skip"]
    done = pretrain(tiny_pretrain(tmp_path / "run", *words, "steps=4"))
    assert same(state(done, 3), state(done, 4))
    assert [line.get("pretrain/nonfinite_steps") for line in read_metrics(done)] == [None, None, None, 1, 2]
    assert state(done, 4)["skipped"] == (2, 0)
    on = pretrain(tiny_pretrain(tmp_path / "run", *words, "steps=5", "resume=changed"))
    assert state(on, 5)["skipped"] == (3, 0)
    with pytest.raises(NonFiniteError, match="step 5"):
        pretrain(tiny_pretrain(tmp_path / "limit", *words, "optim.nonfinite.limit=3"))
    assert state(tmp_path / "limit", 5)["skipped"] == (3, 0)  # the step that ended it was not passed over


def test_a_clipped_bad_step_is_passed_over_under_a_scaler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled() -> Any:
        accelerator = start_accelerator()
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        accelerator.native_amp = False  # fp32 arithmetic is enough to see what the scaler is told
        return accelerator

    def once(self: SimCLR, embeddings: dict[str, torch.Tensor], batch: Batch) -> StepOutput:
        output = objective(self, embeddings, batch)
        if batch.clock.step == 1:
            output.loss = output.loss * torch.nan
        return output

    monkeypatch.setattr("ssl_pipeline.pretrain.start_accelerator", scaled)
    monkeypatch.setattr("accelerate.Accelerator.mixed_precision", "fp16")
    monkeypatch.setattr(SimCLR, "objective", once)
    done = pretrain(
        tiny_pretrain(tmp_path / "run", *EACH, "steps=4", "optim.grad_clip_norm=1.0", "optim.nonfinite.action=skip")
    )
    assert state(done, 4)["skipped"] == (1, 0)
    assert state(done, 4)["scaler"]["scale"] == 2.0**10
    assert not same(state(done, 3), state(done, 4))


def test_a_scalers_own_skips_are_only_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled() -> Any:
        accelerator = start_accelerator()
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        return accelerator

    monkeypatch.setattr("ssl_pipeline.pretrain.start_accelerator", scaled)
    done = pretrain(tiny_pretrain(tmp_path / "run", *EACH, "steps=6"))
    counts = [line.get("pretrain/skipped_steps", 0) for line in read_metrics(done)]
    assert 1 <= counts[-1] < 6
    assert counts == sorted(counts)
    assert not any("pretrain/nonfinite_steps" in line for line in read_metrics(done))


def test_a_scaler_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled() -> Any:
        accelerator = start_accelerator()
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # halved until the gradient is finite
        return accelerator

    monkeypatch.setattr("ssl_pipeline.pretrain.start_accelerator", scaled)
    words = [*EACH, "steps=4", "save_total_limit=4"]
    run = pretrain(tiny_pretrain(tmp_path / "run", *words))
    whole = state(run, 4)
    assert whole["scaler"]["scale"] < 2.0**127
    for done in (3, 4):
        (run / "checkpoints" / f"step-{done:09d}.pt").unlink()
    pretrain(tiny_pretrain(run, *words, "resume=auto"))
    assert state(run, 4)["scaler"] == whole["scaler"]
    assert state(run, 4)["skipped"] == whole["skipped"]
    assert same(state(run, 4), whole)


def test_one_processs_bad_number_stops_all(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = ranks(2, "tests/fault/one_share.py", *TINY, "steps=9", f"output={run}", FAULT="nan")
    assert done.returncode == 1
    assert done.stderr.count("step 2 gives no finite number: process 1 has a loss of nan") == 1
    assert state(run, 2)["done"] == 2
    report = json.loads((run / "nonfinite.json").read_text())["processes"]
    assert [process["loss"] == "nan" for process in report] == [False, True]
    assert len({*report[0]["batch"], *report[1]["batch"]}) == 32


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 99), st.sampled_from([float("nan"), float("inf"), float("-inf")])), max_size=3),
    st.floats(1e-30, 1e30),
)
def test_the_check_is_finite_just_when_every_gradient_is(
    sizes: list[int], bad: list[tuple[int, float]], scale: float
) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2, size)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.randn(2, parameter.shape[1]).t().contiguous().t() * scale
    for place, value in bad:
        gradient = parameters[place % len(parameters)].grad
        assert gradient is not None
        gradient[place % 2, place % gradient.shape[1]] = value
    parameters.append(torch.nn.Parameter(torch.zeros(3)))  # takes no part
    assert bool(torch.isfinite(gradient_check(parameters))) == (not bad)


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm2d(4), EvoNorm2dB0(4)], ids=["BatchNorm", "EvoNorm"])
def test_statistics_are_kept_and_restored(norm: torch.nn.Module) -> None:
    statistics = BatchNormSnapshot(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), norm))
    norm(torch.randn(4, 4, 3, 3))
    statistics.keep()
    before = {name: value.clone() for name, value in norm.named_buffers()}
    assert before["running_var"].ne(1).all()
    norm(torch.full((4, 4, 3, 3), torch.nan))
    statistics.restore()
    assert all(torch.equal(value, before[name]) for name, value in norm.named_buffers())


@given(st.integers(0, 10_000), st.floats(0.01, 5), st.floats(0.05, 10))
def test_a_falling_noisy_loss_is_no_spike_and_a_jump_is_one(seed: int, noise: float, scale: float) -> None:
    steps = torch.arange(200.0)
    drawn = torch.randn(200, generator=torch.Generator().manual_seed(seed)).clamp(-4, 4)
    losses = (scale * (3 + 4 / (1 + steps / 30) + 0.05 * noise * drawn)).tolist()
    spikes = LossSpikes()
    assert not any(spikes(loss) for loss in losses)
    continued = LossSpikes(losses[-50:])
    for watch in (spikes, continued):
        assert watch(losses[-1] + scale * 40)
        assert watch(losses[-1] + scale * 40) is None  # told once
        assert watch(losses[-1]) is None
        assert watch(float("nan"))


def test_a_spike_is_told_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def jumps(self: SimCLR, embeddings: dict[str, torch.Tensor], batch: Batch) -> StepOutput:
        output = objective(self, embeddings, batch)
        return StepOutput(output.loss + 50 * (batch.clock.step == 24), output.metrics)

    monkeypatch.setattr(SimCLR, "objective", jumps)
    done = pretrain(tiny_pretrain(tmp_path / "run", "steps=26"))
    assert [line["step"] for line in read_metrics(done) if "loss spike" in str(line.get("alert"))] == [25]
    assert "The loss has jumped" in capsys.readouterr().out
