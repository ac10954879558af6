"""What labels choose: the probe's weight decay, and the step that is kept. Few of them choose nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.data.splits import folds
from ssl_pipeline.downstream import classification
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.labels import LabeledSplit, LabelsConfig, draw
from ssl_pipeline.downstream.plan import selection
from ssl_pipeline.downstream.pooled_task import PooledConfig, Rows, choose_decay
from ssl_pipeline.downstream.regime import Best, TrainContext, train
from ssl_pipeline.evaluation.features import extract
from ssl_pipeline.finetune import finetune
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.metrics.linear_probe import fit_linear
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import EncoderSpec
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.schedules import TrainProgress
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing
from tests.runs import same_bytes

SHARE = DistInfo(0, 1, torch.device("cpu"))
PREPROCESSING = Preprocessing(12, (0.5,), (0.3,))
BLUEPRINT = EncoderSpec(
    backbone=BackboneConfig(width=4), neck=NeckConfig(), channels=1, size=12, mean=(0.5,), std=(0.3,)
)


def images(count: int, classes: int = 2, seed: int = 0) -> ArrayDataset:
    """A class is the brightness of an image's upper half, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    pixels = 110 + 60 * torch.randn(count, 1, 12, 12, generator=generator)
    pixels[:, :, :6] += 25 * labels[:, None, None, None]
    return ArrayDataset("halves", pixels.clamp(0, 255).byte(), labels, tuple("abcdefgh"[:classes]))


def classifier(classes: int = 2) -> Classification:
    torch.manual_seed(0)
    return classification.Config(name="classification").build(BLUEPRINT.build()[0], classes)


def around(labeled: LabeledSplit, *words: str) -> tuple[FinetuneConfig, TrainContext]:
    config = load("finetune", FinetuneConfig, ["tracking=off", "init=random", *words])
    policy, _ = config.transform.model_copy(update={"size": 12}).for_channels(1)
    views = Views(policy, (0.5,), (0.3,), 0)
    return config, TrainContext(labeled, views, PREPROCESSING, 0, Accelerator(cpu=True), 0)


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (100, 0), (990, 0), (1000, 200), (7000, 1400)])
def test_only_labels_enough_to_tell_steps_apart_are_held_out_by_default(count: int, held_out: int) -> None:
    assert LabelsConfig().held_out(count) == held_out
    assert LabelsConfig(validation=0.2).held_out(count) == round(0.2 * count)
    assert LabelsConfig(validation=0).held_out(count) == 0


@pytest.mark.parametrize("wrong", ["1", "-0.1", "some"])
def test_another_share_is_told(wrong: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"`labels.validation`: '?{wrong}'? is no share of the labels: give auto, or"
    ):
        load("finetune", FinetuneConfig, ["tracking=off", f"labels.validation={wrong}"])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_folds_have_their_share_of_every_class_and_leave_some_of_it_to_learn_from(sizes: list[int], seed: int) -> None:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    part = folds(labels, 5, seed)
    if max(sizes) == 1:
        assert part is None
        return
    assert part is not None
    count = min(5, max(sizes))
    assert set(part.tolist()) - {-1} == set(range(count))
    for label, size in enumerate(sizes):
        own = part[labels == label]
        if size == 1:
            assert own.tolist() == [-1]
        else:
            of_part = own.bincount(minlength=count)
            assert int(of_part.max() - of_part.min()) <= 1
            assert int(of_part.max()) < size
    again = folds(labels, 5, seed)
    assert again is not None
    assert torch.equal(part, again)


def test_few_labels_all_teach_and_choose_by_cross_validation() -> None:
    config, pool = classification.Config(name="classification"), images(1200)
    few = draw(LabelsConfig(per_class=10), config, pool, 0)
    assert few.validation is None
    assert few.folds is not None
    assert few.folds.bincount().tolist() == [4] * 5
    assert draw(LabelsConfig(per_class=1), config, pool, 0).folds is None
    assert draw(LabelsConfig(per_class=10, validation=0), config, pool, 0).folds is None
    many = draw(LabelsConfig(), config, pool, 0)
    assert many.folds is None
    assert many.validation is not None
    assert len(many.validation) == 240


class Told(Classification):
    """Predicts as it is told for a weight decay, which it notes with the number of images it was fitted to."""

    def __init__(self, right: Callable[[float, Tensor], Tensor]) -> None:
        super().__init__(classification.Config(name="classification"), BLUEPRINT.build()[0], 2)
        self.right, self.fitted = right, list[tuple[float, int]]()

    def fit_head(self, features: Tensor, targets: Tensor, decay: float) -> None:
        self.fitted.append((decay, len(targets)))

    def of_features(self, features: Tensor) -> Tensor:
        right = self.right(self.fitted[-1][0], features[:, 0])
        return torch.nn.functional.one_hot((features[:, 1].long() + 1 - right.long()) % 2, 2).float()


def rows(count: int) -> Rows:
    """The first feature is a row's number, the second one its class."""
    numbers = torch.arange(count)
    return Rows(torch.stack([numbers, numbers % 2], 1).float(), numbers % 2, numbers)


def test_the_decay_is_the_best_over_all_folds_and_the_largest_of_equals() -> None:
    shares = {0.001: 6, 0.01: 7, 0.1: 7, 1.0: 5}  # of ten images
    task = Told(lambda decay, number: number < shares[decay])
    parts = folds(torch.arange(10) % 2, 5, 0)
    assert choose_decay(task, (0.001, 0.01, 0.1, 1.0), rows(10), None, parts) == 0.1
    assert sorted(set(task.fitted)) == [(decay, 8) for decay in sorted(shares)]
    assert len(task.fitted) == 4 * 5
    assert choose_decay(task, (0.01, 0.1), rows(10), rows(7), None) == 0.1
    assert choose_decay(task, (0.01, 0.1, 1.0), rows(10), None, None) == 0.01  # nothing chooses


def test_images_of_no_fold_always_teach() -> None:
    task = Told(lambda decay, number: number < 3)
    parts = torch.tensor([0, 1, 0, 1, -1, -1])
    choose_decay(task, (0.1, 1.0), rows(6), None, parts)
    assert set(task.fitted) == {(0.1, 4), (1.0, 4)}


def head_of(task: Classification) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in task.head.parameters()]


def test_a_probe_is_fitted_again_to_the_labels_that_chose() -> None:
    pool, task = images(60), classifier()
    labeled = draw(LabelsConfig(validation=0.3), classification.Config(name="classification"), pool, 0)
    assert labeled.validation is not None
    config, surroundings = around(labeled, "regime=frozen", "regime.weight_decays=[0.1]")
    train(config.regime, task, surroundings)
    features = torch.cat(
        [extract(task.encoder, part, PREPROCESSING, SHARE) for part in (labeled.train, labeled.validation)]
    )
    labels = torch.cat([part.labels for part in (labeled.train, labeled.validation) if part.labels is not None])
    for own, wanted in zip(head_of(task), fit_linear(features, labels, 2, 0.1), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("harm", [True, False])
def test_the_probe_is_a_candidate_of_the_training_that_follows(harm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    labeled = draw(LabelsConfig(validation=0.3), classification.Config(name="classification"), images(60), 0)
    words = ["regime=lp_ft", "regime.length=2 steps", "regime.min_steps=0", "regime.weight_decays=[0.1]"]
    config, surroundings = around(labeled, *words)
    task, probe = classifier(), classifier()
    encoder = copy.deepcopy(task.encoder.state_dict())
    train(config.regime.model_copy(update={"name": "frozen"}), probe, surroundings)
    seen = list[float]()

    def evaluate(self: Classification, *_: object) -> dict[str, float]:
        seen.append(-float(len(seen)) if harm else 0.5)  # always worse, or always the same
        return {"accuracy": seen[-1]}

    monkeypatch.setattr(Classification, "evaluate", evaluate)
    train(config.regime, task, surroundings)
    assert len(seen) == 3  # the probe, and each step
    moved = any(not torch.equal(value, encoder[name]) for name, value in task.encoder.state_dict().items())
    assert moved == (not harm)  # of equals the last step's
    same_head = all(torch.equal(*pair) for pair in zip(head_of(task), head_of(probe), strict=True))
    assert same_head == harm  # a probe that is kept learns from all labels


def test_the_latest_of_equals_is_kept() -> None:
    task = classifier()
    labeled = LabeledSplit(images(8), images(8, seed=1))
    best = Best(task, around(labeled)[1])
    for step, value in enumerate((0.5, 0.7, 0.7, 0.6, float("nan"))):
        task.evaluate = lambda *_, value=value: {"accuracy": value}  # type: ignore[method-assign]
        with torch.no_grad():
            task.head.bias.fill_(step)  # type: ignore[operator]
        best.evaluate(TrainProgress(step, 5, 1))
    other = Best(task, around(labeled)[1])
    other.on_train_start(copy.deepcopy(best.state_dict()))
    for one in (best, other):
        with torch.no_grad():
            task.head.bias.fill_(9)  # type: ignore[operator]
        one.restore()
        assert task.head.bias.tolist() == [2.0, 2.0]  # type: ignore[operator]


def test_a_probe_that_is_the_best_is_fitted_again_after_a_resume_too() -> None:
    task, fitted = classifier(), list[str]()
    labeled = LabeledSplit(images(8), images(8, seed=1))
    best = Best(task, around(labeled)[1], starts_trained=True, on_all_labels=lambda: fitted.append("before"))
    task.evaluate = lambda *_: {"accuracy": 0.5}  # type: ignore[method-assign]
    best.on_train_start(None)
    resumed = Best(task, around(labeled)[1], starts_trained=True, on_all_labels=lambda: fitted.append("after"))
    resumed.on_train_start(best.state_dict())
    resumed.restore()
    assert fitted == ["after"]
    resumed.evaluate(TrainProgress(0, 5, 1))  # as good, and later
    resumed.restore()
    assert fitted == ["after"]


def test_what_auto_comes_to_is_told_with_its_reason() -> None:
    config, _ = around(LabeledSplit(images(8), None), "regime=lp_ft")
    task = config.downstream
    assert isinstance(task, PooledConfig)

    def told(*words: str, pool: ArrayDataset, **labels: object) -> str:
        config, _ = around(LabeledSplit(images(8), None), *words)
        own = LabelsConfig.model_validate(labels)
        record = selection(own, config.downstream, config.regime, draw(own, config.downstream, pool, 0))
        assert record["learned_from"] + record["held_out"] == (own.per_class or len(pool) // 2) * 2
        return str(record["why"])

    pool = images(1200)
    few = told("regime=lp_ft", pool=pool, per_class=10)
    assert "20 to learn from, none held out (labels.validation=auto" in few
    assert "5-fold cross-validation" in few
    assert "The last step is kept" in few
    assert "no class has two labels" in told("regime=frozen", pool=pool, per_class=1)
    assert "cross-validation" not in told("regime=scratch", pool=pool, per_class=10)
    assert "960 to learn from, 240 held out to choose by" in told("regime=lp_ft", pool=pool)
    assert told("regime=lp_ft", pool=pool, per_class=10, validation=0.2).endswith("(labels.validation=0.2).")


def test_with_few_labels_a_run_is_one_that_selects_nothing_and_its_file_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "tracking=off", "data.val=4000", "split=val", "labels.per_class=3", "regime=scratch", "backbone.width=4", "size=12",
        "regime.length=2 steps", "regime.min_steps=0",
    ]  # fmt: skip
    for name in ("auto", "0"):
        finetune(load("finetune", FinetuneConfig, [*words, f"labels.validation={name}", f"output={tmp_path / name}"]))
    assert same_bytes(tmp_path / "auto", tmp_path / "0", ["model.safetensors"])
    record = json.loads((tmp_path / "auto" / "results.json").read_text())["labels"]
    assert (record["validation"], record["learned_from"], record["held_out"], record["folds"]) == ("auto", 30, 0, 3)
    assert capsys.readouterr().out.count(record["why"]) == 1
    assert json.loads((tmp_path / "0" / "results.json").read_text())["labels"]["folds"] == 0
