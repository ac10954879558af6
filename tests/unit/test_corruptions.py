from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.reading import read_in_order
from ssl_pipeline.evaluation.corruptions import CORRUPTIONS, STRENGTHS, Corrupted
from ssl_pipeline.transforms.preprocessing import Preprocessing


def photos(channels: int, count: int = 3) -> ArrayDataset:
    """Pictures of 40 × 32 pixels with coarse and fine structure."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(30, 200, 40 * 32).reshape(1, 1, 40, 32) + 40 * torch.rand(1, 1, 40, 32, generator=generator)
    ramp = ramp.repeat(count, channels, 1, 1)
    ramp[1:, :1] *= 0.5
    return ArrayDataset("photos", ramp.to(torch.uint8), torch.arange(count), tuple("abc"))


def values(source: Corrupted | ArrayDataset, index: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.asarray(source.open_image(index), dtype=np.float64) / 255)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_strength_harms_more_than_the_one_before_and_repeats_itself(name: str, channels: int) -> None:
    clean = Corrupted(photos(channels), 32, name, 1)._source.open_image(0).crop((0, 4, 32, 36))
    reference = torch.from_numpy(np.asarray(clean, dtype=np.float64) / 255)
    harm = []
    for strength in STRENGTHS:
        one = Corrupted(photos(channels), 32, name, strength)
        image = one.open_image(0)
        assert image.mode == ("L" if channels == 1 else "RGB")
        assert image.size == (32, 32)
        assert torch.equal(values(one), values(Corrupted(photos(channels), 32, name, strength)))
        harm.append(float((values(one) - reference).square().mean()))
    assert harm[0] > 0
    assert all(later > earlier * 0.98 for earlier, later in pairwise(harm)), harm
    assert harm[-1] > 1.1 * harm[0], harm


def test_noise_belongs_to_the_sample_and_the_seed() -> None:
    source = ArrayDataset("grayscale", torch.full((2, 1, 8, 8), 128, dtype=torch.uint8))
    first = Corrupted(source, 8, "gaussian_noise", 3)
    assert not torch.equal(values(first, 0), values(first, 1))
    assert not torch.equal(values(first), values(Corrupted(source, 8, "gaussian_noise", 3, seed=1)))


def test_contrast_and_brightness_are_their_formulas() -> None:
    source = photos(3)
    square = torch.from_numpy(np.asarray(source.open_image(1).crop((0, 4, 32, 36)), dtype=np.float64) / 255)
    means = square.mean((0, 1), keepdim=True)
    flat = ((square - means) * 0.2 + means).clamp(0, 1)
    torch.testing.assert_close(values(Corrupted(source, 32, "contrast", 3), 1), flat, atol=1 / 255, rtol=0)
    hsv = np.asarray(Image.fromarray((square.numpy() * 255).astype(np.uint8)).convert("HSV"), dtype=np.float64)
    found = np.asarray(Corrupted(source, 32, "brightness", 2).open_image(1).convert("HSV"), dtype=np.float64)
    expected = np.minimum(hsv[..., 2] + 0.2 * 255, 255)
    assert np.abs(found[..., 2] - expected).max() <= 2
    assert np.abs(found[..., 0] - hsv[..., 0]).max() <= 3  # the hue stays


def test_a_corrupted_source_is_read_like_any_other() -> None:
    source = photos(3)
    corrupted = Corrupted(source, 16, "jpeg", 2)
    (batch,) = read_in_order(corrupted, Preprocessing(16, (0.0,) * 3, (1.0,) * 3), torch.device("cpu"))
    assert batch.shape == (3, 3, 16, 16)
    assert torch.equal(batch[2].double(), values(corrupted, 2).permute(2, 0, 1).float().double())
    assert corrupted.fingerprint() != Corrupted(source, 16, "jpeg", 3).fingerprint()
    with pytest.raises(NotImplementedError):
        corrupted.select(torch.arange(1))
