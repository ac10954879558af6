"""The synthetic domains: the same classes, images of their own, the same for ever."""

from __future__ import annotations

import pytest
import torch

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.sources.fashion_domains import DOMAINS, Config
from ssl_pipeline.data.splits import Split
from ssl_pipeline.finetune_config import FinetuneConfig


def opened(split: Split = "train", **keys: object) -> ArrayDataset:
    return Config.model_validate({"name": "fashion_domains", **keys}).open(split)


def of(source: ArrayDataset, domain: str) -> torch.Tensor:
    assert source.domains is not None
    assert source.pixels is not None
    return source.pixels[source.domains == DOMAINS.index(domain)]


@pytest.mark.parametrize(("split", "count"), [("train", 1750), ("val", 250), ("test", 2000)])
def test_a_domain_has_its_share_of_every_class(split: Split, count: int) -> None:
    source = opened(split)
    assert source.domains is not None
    assert source.labels is not None
    assert source.domains.bincount().tolist() == [count] * 4
    for number in range(4):
        of_class = source.labels[source.domains == number].bincount(minlength=10)
        assert int(of_class.max() - of_class.min()) <= 25


def test_no_training_image_is_in_two_domains() -> None:
    source = opened()
    original = {image.numpy().tobytes() for image in of(source, "original")}
    righted = {image.numpy().tobytes() for image in 255 - of(source, "inverted")}
    assert len(original) > 1740
    assert not original & righted


def test_test_images_are_shown_in_every_domain() -> None:
    source = opened("test")
    original = sorted(image.numpy().tobytes() for image in of(source, "original"))
    assert original == sorted(image.numpy().tobytes() for image in 255 - of(source, "inverted"))


def test_a_texture_takes_the_background_alone_and_is_each_images_own() -> None:
    source = opened("test", domains=["textured"])
    pixels = of(source, "textured")
    corners = pixels[:, 0, :2, :2].flatten(1)
    assert len(corners.unique(dim=0)) > 1900
    bright = of(opened("test", domains=["original"]), "original") >= 64
    assert abs(float(bright.float().mean()) - float((pixels >= 64).float().mean())) < 0.35
    assert pixels.float().std(0).mean() > 20


def test_edges_of_a_flat_image_are_nothing() -> None:
    from ssl_pipeline.data.sources.fashion_domains import _edges
    from ssl_pipeline.rng import NamedRNG

    step = torch.zeros(1, 1, 6, 6, dtype=torch.uint8)
    step[..., 3:] = 100
    edges = _edges(step, NamedRNG(torch.arange(1), 0, "x"))
    assert edges[0, 0, 2].tolist() == [0, 0, 100, 100, 0, 0]  # Sobel's sum of 4 × 100, over 4


def test_a_domain_is_the_same_whatever_others_are_taken() -> None:
    every, one = opened(), opened(domains=["edges"])
    assert torch.equal(of(every, "edges"), of(one, "edges"))
    assert one.domain_names == DOMAINS
    assert one.fingerprint() == opened(domains=["edges"]).fingerprint() != every.fingerprint()


def test_an_imbalance_makes_later_classes_rarer_in_its_domain_alone() -> None:
    source = opened(imbalance={"inverted": 10})
    assert source.domains is not None
    assert source.labels is not None
    counts = source.labels[source.domains == DOMAINS.index("inverted")].bincount(minlength=10)
    assert counts.diff().le(0).all()
    assert 8 < float(counts[0] / counts[-1]) < 12
    assert len(of(source, "original")) == 1750


def test_unknown_names_are_told() -> None:
    with pytest.raises(ConfigError, match="there is no domain 'sketch': known are original"):
        load("finetune", FinetuneConfig, ["data=fashion_domains", "data.domains=[sketch]"])
    with pytest.raises(ConfigError, match="1 or more"):
        load("finetune", FinetuneConfig, ["data=fashion_domains", "data.imbalance={edges: 0.5}"])
