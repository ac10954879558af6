"""A bottleneck's BatchNorm fits the features before a head is fitted behind it, whatever their scale."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ssl_pipeline.config.command import load
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.domain.plan import train_across
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.labels import LabeledSplit
from ssl_pipeline.downstream.regime import TrainContext, train
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.bottleneck import BottleneckConfig, build_bottleneck, estimate_bottleneck
from ssl_pipeline.models.encoder import EncoderSpec
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing

SHARE = DistInfo(0, 1, torch.device("cpu"))
PREPROCESSING = Preprocessing(12, (0.5,), (0.3,))
BLUEPRINT = EncoderSpec(
    backbone=BackboneConfig(width=8), neck=NeckConfig(), channels=1, size=12, mean=(0.5,), std=(0.3,)
)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_its_statistics_are_those_of_all_features(scale: float, activation: str) -> None:
    torch.manual_seed(0)
    bottleneck, width = build_bottleneck(BottleneckConfig(width=6, activation=activation), 9)
    features = scale * (torch.rand(301, 9) + 2)
    before = copy.deepcopy(bottleneck.state_dict())
    estimate_bottleneck(bottleneck, features)
    assert bottleneck.training
    after = bottleneck.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"1.running_mean", "1.running_var"}
    linear = bottleneck[0](features)  # type: ignore[index]
    torch.testing.assert_close(after["1.running_mean"], linear.mean(0))
    torch.testing.assert_close(after["1.running_var"], linear.var(0))
    torch.testing.assert_close(bottleneck.eval()(features), bottleneck.train()(features), rtol=0.01, atol=0.01)
    assert width == 6


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_without_a_batchnorm_nothing_changes(norm: str) -> None:
    for network in (build_bottleneck(BottleneckConfig(width=6, norm=norm), 9)[0], nn.Identity()):
        before = copy.deepcopy(network.state_dict())
        estimate_bottleneck(network, torch.randn(20, 9))
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_one_image_has_no_variance() -> None:
    bottleneck, _ = build_bottleneck(BottleneckConfig(width=6), 9)
    estimate_bottleneck(bottleneck, torch.randn(1, 9))
    assert all(bool(value.isfinite().all()) for value in bottleneck.state_dict().values())


def images(count: int, seed: int = 0) -> ArrayDataset:
    """A class is an image's brightness, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    pixels = 110 + 60 * torch.randn(count, 1, 12, 12, generator=generator)
    pixels += 40 * labels[:, None, None, None]
    return ArrayDataset("shades", pixels.clamp(0, 255).byte(), labels, ("dark", "bright"))


def at_the_first_step(monkeypatch: pytest.MonkeyPatch, scale: float, *words: str) -> Classification:
    """The classifier as the loop over all layers gets it; its encoder's features are scaled, as other networks' are."""
    method = ["domain.source=[a]", "domain.target=[b]"] if any(word.startswith("domain=") for word in words) else []
    bottleneck = [] if method else ["downstream.bottleneck.width=256"]
    told = ["tracking=off", "regime=lp_ft", "regime.freeze_bn_stats=true", "regime.weight_decays=[0.1]"]
    config = load("finetune", FinetuneConfig, [*told, *words, *method, *bottleneck])
    torch.manual_seed(0)
    task = config.downstream.build(BLUEPRINT.build()[0], 2)
    assert isinstance(task, Classification)
    features = task.encoder.features
    task.encoder.features = lambda images: scale * features(images)  # type: ignore[method-assign]
    policy, _ = config.transform.model_copy(update={"size": 12}).for_channels(1)
    labeled, views = LabeledSplit(images(160), None), Views(policy, (0.5,), (0.3,), 0)
    around = TrainContext(labeled, views, PREPROCESSING, 0, Accelerator(cpu=True), 0)
    for module in ("downstream.regime", "domain.plan"):
        monkeypatch.setattr(f"ssl_pipeline.{module}.run_loop", lambda *_: None)
    if config.domain is None:
        train(config.regime, task, around)
    else:
        target = images(40, 1)
        target.labels = target.classes = None
        train_across(config.domain, config.regime, task, target, around)
    return task


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("words", [[], ["domain=erm"], ["domain=coral"], ["domain=shot_im"]], ids=" ".join)
def test_a_probe_is_as_good_in_training_as_it_was_fitted(
    words: list[str], scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, pool = at_the_first_step(monkeypatch, scale, *words), images(160)
    assert pool.pixels is not None
    assert pool.labels is not None
    views = PREPROCESSING.of_pixels(pool.pixels)

    @torch.no_grad()
    def logits(mode: bool) -> Tensor:
        task.train(mode)
        return task.predict(views)

    found = {mode: logits(mode) for mode in (False, True)}
    for mode, given in found.items():
        right = (given.argmax(1) == pool.labels).float().mean()
        assert right > 0.8, f"in training mode: {mode}"
    torch.testing.assert_close(found[True], found[False], rtol=0.05, atol=0.05)
