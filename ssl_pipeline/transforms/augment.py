"""What follows the crop: amplitude mix, rotation, color jitter, grayscale, blur, solarize, normalization and erasing.

The operations take float images in [0, 1] of shape (B, C, H, W) and strengths of shape (B,), and return new images of the same
shape. They mean what torchvision's mean, and tests hold them to it. None uses ``torch.where`` on pixels: on a CPU it branches,
and costs as much as ten other operations. Draws are made on the CPU whatever the device: which samples an operation leaves out
is known there, so nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.rng import NamedRNG
from ssl_pipeline.transforms.config import ViewConfig
from ssl_pipeline.transforms.crop import cache_parts, random_boxes

_NOT_JITTERED = -1  # in place of an operation's number
# Draws are hashes of their names: another spelling would be another draw.
_DRAW_NAMES = {"grayscale": "grey", "solarize": "solarise"}
_LUMA = (0.299, 0.587, 0.114)
_REACH = 5.0  # sigmas after which the blur's kernel is cut
_BLOCK = 32  # pixels of an output block of the blur


class Augmentation:
    """The operations on the crops of one view.

    Args:
        config: the view's policy, without ``auto``.
        mean: per channel, as the encoder expects it; ``std`` too.
        styles: images in [0, 1], shape (N, C, S, S) with any S, that lend their amplitude; needed where views are restyled.
    """

    def __init__(
        self, config: ViewConfig, mean: tuple[float, ...], std: tuple[float, ...], styles: Tensor | None = None
    ) -> None:
        self._config, jitter = config, config.color_jitter
        expected, spread = (torch.tensor(values, dtype=torch.float64)[None, :, None, None] for values in (mean, std))
        # (x − mean) ÷ std as x · scale + shift: a product is faster than a quotient.
        self._scale, self._shift = (1 / spread).float(), (-expected / spread).float()
        assert jitter.saturation != "auto"
        assert jitter.hue != "auto"
        assert config.grayscale != "auto"
        self._grayscale = config.grayscale
        assert styles is not None or config.amplitude_mix.probability == 0
        self._styles = styles
        operations: list[tuple[str, Callable[[Tensor, Tensor], Tensor], float, float]] = [
            ("brightness", brightness, 1.0, jitter.brightness),
            ("contrast", contrast, 1.0, jitter.contrast),
            ("saturation", saturation, 1.0, jitter.saturation),
            ("hue", hue, 0.0, jitter.hue),
        ]
        self._jitter = [operation for operation in operations if operation[3] > 0 and jitter.probability > 0]
        self._orders = torch.tensor(list(permutations(range(len(self._jitter)))), dtype=torch.int64)

    def __call__(self, crops: Tensor, draws: NamedRNG) -> Tensor:
        """Augments and normalizes a batch, (B, C, S, S), to float32; crops are uint8 or float in [0, 1], and float ones overwritten."""
        finished = torch.empty(crops.shape, device=crops.device)
        # Saves autograd's share of each small operation; ``finished`` was made outside, so a network may train on it.
        with torch.inference_mode():
            drawn = self._draw(draws, crops.shape[-1])
            for rows in cache_parts(crops):
                self._apply(crops[rows], {name: values[rows] for name, values in drawn.items()}, finished[rows])
        return finished

    def _draw(self, draws: NamedRNG, size: int) -> dict[str, Tensor]:
        """What happens to each sample; an operation that the policy never does is absent."""
        config = self._config
        chances = {
            "restyle": config.amplitude_mix.probability,
            "rotation": config.rotation.probability,
            "grayscale": self._grayscale,
            "blur": config.gaussian_blur.probability,
            "solarize": config.solarize,
        }
        chances = {name: chance for name, chance in chances.items() if chance > 0}
        ranges = {
            "jitter": (0.0, 1.0),
            "jitter order": (0.0, float(len(self._orders))),
            "rotation degrees": (-config.rotation.degrees, config.rotation.degrees),
            "blur sigma": config.gaussian_blur.sigma,
            **{name: (neutral - spread, neutral + spread) for name, _, neutral, spread in self._jitter},
            **dict.fromkeys(chances, (0.0, 1.0)),
        }
        if "restyle" in chances:
            assert self._styles is not None
            ranges |= {"style": (0.0, float(len(self._styles))), "style strength": (0.0, config.amplitude_mix.strength)}
        names = [_DRAW_NAMES.get(name, name) for name in ranges]
        uniform = dict(zip(ranges, draws.uniforms(names).unbind(1), strict=True))
        drawn = {name: low + (high - low) * uniform[name] for name, (low, high) in ranges.items()}
        drawn |= {name: drawn[name] < chance for name, chance in chances.items()}
        left_out = drawn.pop("jitter") >= config.color_jitter.probability
        drawn["order"] = self._orders[drawn.pop("jitter order").long()].masked_fill(left_out[:, None], _NOT_JITTERED)
        if config.erasing.probability > 0:
            sides = torch.full_like(draws.index, size)
            boxes, fit = random_boxes(draws, "erasing", sides, sides, config.erasing)
            drawn["erasing"] = boxes * (draws.happens("erasing", config.erasing.probability) & fit)[:, None]
        return drawn

    def _apply(self, crops: Tensor, drawn: dict[str, Tensor], out: Tensor) -> None:
        """Writes a part of a batch into ``out`` by its last operation."""
        images = crops.float().div_(255) if crops.dtype == torch.uint8 else crops
        if "restyle" in drawn:
            images = _where(drawn["restyle"], images, self._restyle, drawn["style"], drawn["style strength"])
        if "rotation" in drawn:
            images = _where(drawn["rotation"], images, rotate, drawn["rotation degrees"])
        # Samples differ in which operation is first, second, …: each place takes those together that share it.
        for place in drawn["order"].unbind(1):
            for number in set(place.tolist()) - {_NOT_JITTERED}:
                name, operation, _, _ = self._jitter[number]
                images = _where(place == number, images, operation, drawn[name])
        if "grayscale" in drawn:
            images = _where(drawn["grayscale"], images, grayscale)
        if "blur" in drawn:
            blur = partial(gaussian_blur, greatest=float(drawn["blur sigma"].max()))
            images = _where(drawn["blur"], images, blur, drawn["blur sigma"])
        if "solarize" in drawn:
            images = _where(drawn["solarize"], images, solarize)
        torch.mul(images, self._scale.to(images.device), out=out).add_(self._shift.to(images.device))
        if "erasing" in drawn:
            erase_(out, drawn["erasing"].to(images.device))

    def _restyle(self, images: Tensor, style: Tensor, strength: Tensor) -> Tensor:
        assert self._styles is not None
        if self._styles.device != images.device or self._styles.shape[2:] != images.shape[2:]:
            styles = self._styles.to(images.device)
            self._styles = F.interpolate(styles, images.shape[2:], mode="bilinear", antialias=True)
        return amplitude_mix(images, self._styles[style.long()], strength).clamp_(0, 1)


def _where(chosen: Tensor, images: Tensor, operation: Callable[..., Tensor], *strengths: Tensor) -> Tensor:
    """Applies an operation to the chosen samples; ``chosen`` and strengths are on the CPU. May overwrite the images."""
    rows = chosen.nonzero()[:, 0]
    if len(rows) == 0:
        return images
    given = [strength.index_select(0, rows).to(images.device) for strength in strengths]
    if len(rows) == len(images):
        return operation(images, *given)
    rows = rows.to(images.device)
    return images.index_copy_(0, rows, operation(images.index_select(0, rows), *given))


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotates square images, (B, C, S, S), counter-clockwise about their center by angles of shape (B,), bilinear.

    What lies outside is mirrored: black corners would give the angle away.
    """
    angle = torch.deg2rad(degrees)
    cos, sin, none = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrix = torch.stack([torch.stack([cos, -sin, none], 1), torch.stack([sin, cos, none], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def erase_(images: Tensor, boxes: Tensor) -> None:
    """Sets a box of each image, (B, 4), to 0 in place; a box of height 0 erases nothing."""
    top, left, height, width = boxes[:, :, None].unbind(1)
    row, column = (torch.arange(side, device=images.device) for side in images.shape[2:])
    rows = (row >= top) & (row < top + height)
    columns = (column >= left) & (column < left + width)
    images.mul_(~(rows[:, None, :, None] & columns[:, None, None, :]))


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
