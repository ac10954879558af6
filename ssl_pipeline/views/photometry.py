"""What a view looks like: batched colour and blur operations, one strength per sample.

Every function takes float images in [0, 1] of shape (B, C, H, W) and strengths of shape (B,), and returns images of the
same shape in [0, 1]. Their meaning is torchvision's; their tests hold them to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_pipeline.views.geometry import separable

_LUMA = (0.299, 0.587, 0.114)


def _per_sample(strength: Tensor) -> Tensor:
    return strength[:, None, None, None]


def luma(images: Tensor) -> Tensor:
    """The grey image, (B, 1, H, W): ITU-R 601 luma of RGB, the image itself if grey, the channels' mean otherwise."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    return (images * images.new_tensor(_LUMA)[None, :, None, None]).sum(1, keepdim=True)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scales all values."""
    return (images * _per_sample(factor)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scales the distance from the image's mean grey."""
    mean = luma(images).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean.expand_as(images), images, _per_sample(factor)).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scales the distance from the pixel's grey."""
    return torch.lerp(luma(images).expand_as(images), images, _per_sample(factor)).clamp_(0, 1)


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turns the hue by a share of the circle (0.5 is the complement); value and saturation of HSV stay.

    Args:
        images: RGB.
        turn: in [-0.5, 0.5].
    """
    high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = high - low
    red, green, blue = images.split(1, 1)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    sixths = torch.where(
        high == red,
        ((green - blue) / divisor) % 6,
        torch.where(high == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    place = sixths + 6 * _per_sample(turn)
    offsets = images.new_tensor([5.0, 3.0, 1.0])[None, :, None, None]
    sector = (offsets + place) % 6
    return high - chroma * torch.minimum(sector, 4 - sector).clamp_(0, 1)


def grey(images: Tensor, chosen: Tensor) -> Tensor:
    """Replaces the chosen samples by their grey image in all channels."""
    return torch.where(_per_sample(chosen), luma(images).expand_as(images), images)


def solarise(images: Tensor, chosen: Tensor) -> Tensor:
    """Inverts the values of 0.5 and more of the chosen samples."""
    return torch.where(_per_sample(chosen) & (images >= 0.5), 1 - images, images)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, its kernel renormalised at the border; sigma is in pixels, one a sample."""
    rows, columns = (_gaussian_matrix(sigma, side) for side in images.shape[2:])
    return separable(images, rows, columns)


def _gaussian_matrix(sigma: Tensor, side: int) -> Tensor:
    place = torch.arange(side, device=sigma.device, dtype=torch.float32)
    distance = (place[:, None] - place[None, :]) / sigma[:, None, None]
    weights = torch.exp(-0.5 * distance**2)
    return weights / weights.sum(2, keepdim=True)
