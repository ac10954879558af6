"""Views in the style of other images of the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.data.build import build_views
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.sources.folder import Config as Folder
from ssl_pipeline.finetune import finetune
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.transforms.augment import amplitude_mix
from ssl_pipeline.transforms.config import LocalConfig, RestyleConfig, ViewsConfig
from ssl_pipeline.transforms.multi_view import Views

NEUTRAL = (0.0,) * 3, (1.0,) * 3
SEED = torch.Generator().manual_seed(0)


def photos(count: int, channels: int = 3, side: int = 24) -> ArrayDataset:
    pixels = torch.randint(0, 256, (count, channels, side, side), generator=SEED, dtype=torch.uint8)
    return ArrayDataset("random", pixels)


def policy(channels: int = 3, **restyled: float) -> ViewsConfig:
    config = ViewsConfig(size=16, amplitude_mix=RestyleConfig(**restyled), local_views=LocalConfig(count=1, size=9))
    return config.for_channels(channels)[0]


def made(views: Views, source: ArrayDataset, index: Tensor) -> list[Tensor]:
    assert source.pixels is not None
    return views.finish(views.of_pixels(source.pixels[index], index, 1), index, 1)


@pytest.mark.parametrize("sides", [(8, 8), (7, 9)])
def test_restyling_keeps_the_phase_and_takes_the_amplitude(sides: tuple[int, int]) -> None:
    images, styles = (torch.randn(4, 2, *sides, generator=SEED) + shift for shift in (0, 2))
    assert torch.allclose(amplitude_mix(images, styles, torch.zeros(4)), images, atol=1e-5)
    restyled = amplitude_mix(images, styles, torch.ones(4))
    assert torch.allclose(torch.fft.rfft2(restyled).abs(), torch.fft.rfft2(styles).abs(), atol=1e-3)
    turned = torch.fft.rfft2(restyled) / torch.fft.rfft2(images)
    inside = turned[..., 1:-1]  # where the transform is not real, whose sign is all the phase it has
    assert torch.allclose(inside.imag, torch.zeros_like(inside.imag), atol=1e-2 * float(turned.abs().max()))
    assert bool((inside.real > 0).all())


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_restyled_view_is_its_samples_alone(channels: int) -> None:
    source, index = photos(12, channels), torch.arange(12)
    neutral = (0.0,) * channels, (1.0,) * channels
    views = build_views(source, policy(channels, probability=0.5), *neutral, seed=3)
    whole = made(views, source, index)
    again = build_views(source, policy(channels, probability=0.5), *neutral, seed=3)
    halves = [made(again, source, part) for part in (index[7:], index[:7])]
    for view, ours in enumerate(whole):
        assert torch.allclose(ours, torch.cat([halves[1][view], halves[0][view]]), atol=1e-5)
        assert float(ours.min()) >= -1e-6
        assert float(ours.max()) <= 1 + 1e-6
    plain = made(Views(policy(channels), *neutral, seed=3), source, index)
    changed = [(a - b).flatten(1).abs().amax(1) > 1e-3 for a, b in zip(whole, plain, strict=True)]
    share = float(torch.cat(changed).float().mean())
    assert 0.25 < share < 0.75  # the probability, and the other samples are as they were
    other = made(build_views(source, policy(channels, probability=0.5), *neutral, seed=4), source, index)
    assert not torch.allclose(other[0], whole[0])


def test_strength_bounds_how_far_a_style_goes() -> None:
    source, index = photos(12), torch.arange(12)
    plain = made(Views(policy(), *NEUTRAL, seed=0), source, index)[0]
    far = [
        float((made(build_views(source, policy(probability=1, strength=s), *NEUTRAL, seed=0), source, index)[0] - plain).abs().mean())
        for s in (0.0, 0.3, 1.0)
    ]  # fmt: skip
    assert far[0] < 1e-5 < far[1] < far[2]


def test_files_lend_their_styles_and_nobody_reads_them_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = photos(4, side=30).pixels
    assert pixels is not None
    for i, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    source, opened = Folder(name="folder", path=str(tmp_path)).open("train"), set[int]()
    assert source is not None
    open_image = source.open_image

    def watched(index: int) -> Image.Image:
        opened.add(index)
        return open_image(index)

    monkeypatch.setattr(source, "open_image", watched)
    build_views(source, policy(), *NEUTRAL, seed=0)
    assert not opened
    build_views(source, policy(probability=0.1, styles=2), *NEUTRAL, seed=0)
    assert len(opened) == 2


def test_stage_two_has_no_styles(tmp_path: Path) -> None:
    words = [
        "data=embedded",
        "regime=scratch",
        "tracking=off",
        f"output={tmp_path / 'run'}",
        "transform.amplitude_mix.probability=0.5",
    ]
    with pytest.raises(ConfigError, match=r"`transform\.amplitude_mix` is for stage one"):
        finetune(load("finetune", FinetuneConfig, words))
    assert not (tmp_path / "run").exists()
