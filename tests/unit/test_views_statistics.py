"""A view is its sample's own, and thousands of views have the statistics of torchvision's."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torchvision.transforms.v2 as T
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ssl_pipeline.rng import NamedRNG
from ssl_pipeline.transforms import augment, crop
from ssl_pipeline.transforms.augment import Augmentation
from ssl_pipeline.transforms.config import (
    BlurConfig,
    CropConfig,
    ErasingConfig,
    JitterConfig,
    RotationConfig,
    ViewsConfig,
)
from ssl_pipeline.transforms.crop import resize_matrix
from ssl_pipeline.transforms.multi_view import Views

SIMCLR = ViewsConfig(
    size=16,
    crop=CropConfig(scale=(0.08, 1.0)),
    color_jitter=JitterConfig(brightness=0.8, contrast=0.8),
    gaussian_blur=BlurConfig(probability=0.5, sigma=(0.1, 1.0)),
    solarize=0.2,
)
STRENGTHS = st.lists(st.floats(0, 2, width=32), min_size=4, max_size=4).map(torch.tensor)


def photo(side: int) -> Tensor:
    """A smooth picture in color, uint8 of shape (3, side, side)."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")[0]
    return (smooth * 255).round().to(torch.uint8)


def views_of(config: ViewsConfig, seed: int = 0) -> Views:
    return Views(config.for_channels(3)[0], (0.0,) * 3, (1.0,) * 3, seed)


def figures(views: Tensor) -> dict[str, Tensor]:
    """Per view: its mean and spread, how colorful it is, and where its hue points (B,)."""
    red, green, blue = views.unbind(1)
    chroma = views.amax(1) - views.amin(1)
    across, along = red - (green + blue) / 2, math.sqrt(3) / 2 * (green - blue)  # the hue's plane
    return {
        "mean": views.mean((1, 2, 3)),
        "spread": views.std((1, 2, 3)),
        "detail": (views[..., 1:] - views[..., :-1]).abs().mean((1, 2, 3)),
        "chroma": chroma.mean((1, 2)),
        "hue across": across.mean((1, 2)),
        "hue along": along.mean((1, 2)),
    }


def assert_same_distribution(name: str, ours: Tensor, theirs: Tensor) -> None:
    """First and second moments within four standard errors."""
    for power in (1, 2):
        one, other = ours.double() ** power, theirs.double() ** power
        error = math.sqrt(float(one.var()) / len(one) + float(other.var()) / len(other))
        assert abs(float(one.mean() - other.mean())) < 4 * error, (name, power)


def test_views_have_torchvisions_statistics() -> None:
    count, image = 3000, photo(24)
    ours = views_of(SIMCLR)
    index = torch.arange(count)
    pixels = image.expand(count, -1, -1, -1)
    finished = ours.finish(ours.of_pixels(pixels, index, 0), index, 0)[1]
    theirs = T.Compose(
        [
            T.RandomResizedCrop(16, (0.08, 1.0), antialias=True),
            T.RandomHorizontalFlip(),
            T.ToDtype(torch.float32, scale=True),
            T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([T.GaussianBlur(9, (0.1, 1.0))], 0.5),
            T.RandomSolarize(0.5, 0.2),
        ]
    )
    torch.manual_seed(0)
    expected = figures(torch.stack([theirs(image) for _ in range(count)]))
    for name, found in figures(finished).items():
        assert_same_distribution(name, found, expected[name])


def test_jitter_comes_in_every_order_alike() -> None:
    """Brightness before contrast and after it clip differently, so the orders can be told apart by the views."""
    count = 2400
    config = views_of(SIMCLR).config.each()[0]
    look = Augmentation(config, (0.0,) * 3, (1.0,) * 3)
    order = look._draw(NamedRNG(torch.arange(count), 0, "views"), 16)["order"]
    jittered = order[order[:, 0] >= 0]
    assert abs(len(jittered) / count - 0.8) < 4 * math.sqrt(0.16 / count)
    assert torch.equal(jittered.sort(1).values, torch.arange(4).expand(len(jittered), -1))
    _, counts = jittered.unique(dim=0, return_counts=True)
    assert len(counts) == 24
    expected = len(jittered) / 24
    assert float(((counts - expected) ** 2 / expected).sum()) < 49.7  # chi-squared, 23 degrees of freedom, p = 0.001


EVERYTHING = ViewsConfig.model_validate(
    {
        **SIMCLR.model_dump(),
        "rotation": RotationConfig(probability=0.5, degrees=30).model_dump(),
        "erasing": ErasingConfig(probability=0.5).model_dump(),
        "second_view": {"gaussian_blur": {"probability": 0.1}, "solarize": 0.5},
        "local_views": {"count": 1, "size": 8},
    }
)


@pytest.mark.parametrize("side", [20, 60])
@pytest.mark.parametrize("cache", [1, 3000, 10**9])
def test_a_view_does_not_depend_on_the_batch(side: int, cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on what else is in it, nor on its order, nor on the parts it is worked on in."""
    pixels = torch.stack([photo(side).roll(i, 1) for i in range(12)])
    index = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:12]
    views = views_of(EVERYTHING, seed=5)
    whole = views.finish(views.of_pixels(pixels, index, 3), index, 3)
    monkeypatch.setattr(crop, "_CACHE", cache)
    rows = torch.tensor([7, 2, 11, 4, 0])
    some = views.finish(views.of_pixels(pixels[rows], index[rows], 3), index[rows], 3)
    for one, other in zip(whole, some, strict=True):
        torch.testing.assert_close(one[rows], other, atol=1e-5, rtol=0)
    for one, other in pairwise(whole[:2]):
        assert not torch.equal(one, other)


def test_files_of_other_sizes_in_the_batch_change_nothing() -> None:
    images = [Image.fromarray(photo(side).permute(1, 2, 0).numpy()) for side in (20, 33, 50)]
    index = torch.tensor([4, 8, 6])
    views = views_of(EVERYTHING, seed=5)
    whole, alone = views.of_files(images, index, 1), views.of_files(images[1:2], index[1:2], 1)
    for one, other in zip(whole, alone, strict=True):
        assert torch.equal(one[1:2], other)


def test_a_network_trains_on_the_views() -> None:
    """They are drawn and finished without autograd, and must not forbid it to others."""
    index = torch.arange(2)
    for side in (20, 60):
        views = views_of(EVERYTHING)
        crops = views.of_pixels(photo(side).expand(2, -1, -1, -1), index, 0)
        for view in (*crops, *views.finish(crops, index, 0)):
            weight = torch.ones(1, requires_grad=True)
            (view.float() * weight).sum().backward()
            assert weight.grad is not None


@settings(max_examples=30, deadline=None)
@given(STRENGTHS)
def test_operations_stay_in_range_and_leave_their_input(factor: Tensor) -> None:
    images = torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(2))
    before = images.clone()
    turn = factor / 2 - 0.5
    results = [
        augment.brightness(images, factor),
        augment.contrast(images, factor),
        augment.saturation(images, factor),
        augment.hue(images, turn),
        augment.gaussian_blur(images, factor + 0.1, 2.1),
        augment.grayscale(images),
        augment.solarize(images),
    ]
    assert torch.equal(images, before)
    for result in results:
        assert float(result.min()) >= -1e-6
        assert float(result.max()) <= 1 + 1e-6


@settings(max_examples=30, deadline=None)
@given(STRENGTHS)
def test_hue_turns_back_and_keeps_value_and_chroma(factor: Tensor) -> None:
    images = torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(3))
    turn = factor / 2 - 0.5
    turned = augment.hue(images, turn)
    torch.testing.assert_close(turned.amax(1), images.amax(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(turned.amin(1), images.amin(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(augment.hue(turned, -turn), images, atol=2e-5, rtol=0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_a_resize_is_an_average_of_its_stretch(source: int, target: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, source))
    start = data.draw(st.integers(0, source - length))
    where = torch.tensor([start]), torch.tensor([length])
    matrix = resize_matrix(*where, source, target)[0]
    torch.testing.assert_close(matrix.sum(1), torch.ones(target))
    assert float(matrix.min()) >= 0
    assert not matrix[:, :start].any()
    assert not matrix[:, start + length :].any()
    mirrored = resize_matrix(*where, source, target, torch.tensor([True]))[0]
    assert torch.equal(mirrored, matrix.flip(0))
