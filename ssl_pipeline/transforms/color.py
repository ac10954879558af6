"""What a view looks like: batched color, blur and amplitude operations, one strength per sample.

Every function takes float images in [0, 1] of shape (B, C, H, W) and strengths of shape (B,), and returns new images of the
same shape. They mean what torchvision's mean, and tests hold them to it. None uses ``torch.where`` on pixels: on a CPU it
branches, and costs as much as ten other operations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)
_REACH = 5.0  # sigmas after which the blur's kernel is cut
_BLOCK = 32  # pixels of an output block of the blur


def _per_sample(strength: Tensor) -> Tensor:
    return strength[:, None, None, None]


def luma(images: Tensor) -> Tensor:
    """The grayscale image, (B, 1, H, W): ITU-R 601 luma of RGB, the channels' mean of anything else."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, 1)
    grayscale: Tensor = red * _LUMA[0]
    return grayscale.add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scales all values."""
    return (images * _per_sample(factor)).clamp_(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scales the distance from the image's mean luma."""
    means = images.mean((2, 3))
    mean = means @ means.new_tensor(_LUMA) if images.shape[1] == 3 else means.mean(1)
    return (images * _per_sample(factor)).add_(_per_sample((1 - factor) * mean)).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scales the distance from the pixel's luma."""
    return torch.lerp(luma(images).expand_as(images), images, _per_sample(factor)).clamp_(0, 1)


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turns the hue of RGB by a share of the circle in [-0.5, 0.5]; value and saturation of HSV stay.

    With the channels scaled to [0, 1], the hue lies 1 + g + b - r sixths of the circle away from red, towards green if g > b:
    HSV's six cases in one line.
    """
    red, green, blue = images.split(1, 1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    from_red = (green + blue).sub_(red).sub_(low).div_(chroma.clamp_min(1e-12)).add_(1)
    place = from_red.copysign_(green - blue).div_(6)
    # A channel is at its maximum up to a sixth of the circle from its own hue, at its minimum from a third on.
    channels = images.new_tensor([0, 1 / 3, -1 / 3])[None, :, None, None]
    away: Tensor = place + (_per_sample(turn) - channels + 1.5)
    away.frac_().sub_(0.5).abs_().clamp_(1 / 6, 1 / 3)
    return away.mul_(chroma * -6).add_(high.add_(chroma))


def grayscale(images: Tensor) -> Tensor:
    """The luma in all channels."""
    return luma(images).repeat(1, images.shape[1], 1, 1)


def solarize(images: Tensor) -> Tensor:
    """Inverts values of 0.5 and more."""
    return torch.minimum(images, 1 - images)


def amplitude_mix(images: Tensor, others: Tensor, strength: Tensor) -> Tensor:
    """Moves the Fourier amplitude towards that of other images and keeps the phase (Xu et al. 2021, arXiv 2105.11120).

    Amplitudes carry contrast and texture, phases carry shapes. Strength 1 takes the other image's amplitude; values may
    leave [0, 1].
    """
    spectrum, other = torch.fft.rfft2(images.float()), torch.fft.rfft2(others.float())
    amplitude = torch.lerp(spectrum.abs(), other.abs(), _per_sample(strength))
    mixed: Tensor = torch.fft.irfft2(torch.polar(amplitude, spectrum.angle()), s=images.shape[-2:])
    return mixed.to(images.dtype)


def gaussian_blur(images: Tensor, sigma: Tensor, greatest: float) -> Tensor:
    """Gaussian blur with sigma in pixels, at most ``greatest``; its kernel is cut at five sigmas and renormalized at the border.

    A block of rows needs only the rows that its kernels reach, so each block is a small matrix product.
    """
    reach = math.ceil(_REACH * greatest)
    count, channels, height, width = images.shape
    rows = _gaussian_matrix(sigma, height)
    columns = rows if width == height else _gaussian_matrix(sigma, width)
    lines = images.reshape(count, channels * height, width)
    if max(height, width) <= _BLOCK:
        across = torch.bmm(lines, columns.transpose(1, 2)).reshape(count, channels, height, width)
        return torch.matmul(rows[:, None], across)
    across, blurred = torch.empty_like(lines), torch.empty_like(images)
    for out, source in _blocks(width, reach):
        across[:, :, out] = torch.bmm(lines[:, :, source], columns[:, out, source].transpose(1, 2))
    across = across.reshape(count, channels, height, width)
    for out, source in _blocks(height, reach):
        blurred[:, :, out] = torch.matmul(rows[:, None, out, source], across[:, :, source])
    return blurred


def _blocks(side: int, reach: int) -> list[tuple[slice, slice]]:
    """Blocks of output pixels, each with the input pixels that it depends on."""
    ends = [(low, min(low + _BLOCK, side)) for low in range(0, side, _BLOCK)]
    return [(slice(low, high), slice(max(low - reach, 0), min(high + reach, side))) for low, high in ends]


def _gaussian_matrix(sigma: Tensor, side: int) -> Tensor:
    place = torch.arange(side, device=sigma.device, dtype=torch.float32)
    distance = (place[:, None] - place[None, :]).abs() / sigma[:, None, None]
    # The clamp also keeps exp from denormal numbers, which are a hundred times slower to multiply.
    weights = distance.clamp_(max=_REACH).square_().mul_(-0.5).exp_().sub_(math.exp(-0.5 * _REACH**2))
    return weights / weights.sum(2, keepdim=True)
