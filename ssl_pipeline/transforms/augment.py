"""What follows the crop: amplitude mix, rotation, color jitter, grayscale, blur, solarize, normalization and erasing.

Draws are made on the CPU whatever the device: which samples an operation leaves out is known there, so nothing waits for
the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.rng import NamedRNG
from ssl_pipeline.transforms import color
from ssl_pipeline.transforms.config import ViewConfig
from ssl_pipeline.transforms.crop import cache_parts, random_boxes

_NOT_JITTERED = -1  # in place of an operation's number
_DRAW_NAMES = {
    "grayscale": "grey",
    "solarize": "solarise",
}  # draws are hashes of their names: another spelling, another draw


class Augmentation:
    """The operations on the crops of one view.

    Args:
        config: the view's policy, without ``auto``.
        mean: per-channel mean that the encoder expects.
        std: per-channel standard deviation that the encoder expects.
        styles: images in [0, 1], shape (N, C, S, S) with any S, that lend their amplitude; needed where views are restyled.
    """

    def __init__(
        self, config: ViewConfig, mean: tuple[float, ...], std: tuple[float, ...], styles: Tensor | None = None
    ) -> None:
        self._config, jitter = config, config.jitter
        expected, spread = (torch.tensor(values, dtype=torch.float64)[None, :, None, None] for values in (mean, std))
        # (x − mean) ÷ std as x · scale + shift: a product is faster than a quotient.
        self._scale, self._shift = (1 / spread).float(), (-expected / spread).float()
        assert jitter.saturation != "auto"
        assert jitter.hue != "auto"
        assert config.grayscale != "auto"
        self._grayscale = config.grayscale
        assert styles is not None or config.restyle.probability == 0
        self._styles = styles
        operations: list[tuple[str, Callable[[Tensor, Tensor], Tensor], float, float]] = [
            ("brightness", color.brightness, 1.0, jitter.brightness),
            ("contrast", color.contrast, 1.0, jitter.contrast),
            ("saturation", color.saturation, 1.0, jitter.saturation),
            ("hue", color.hue, 0.0, jitter.hue),
        ]
        self._jitter = [operation for operation in operations if operation[3] > 0 and jitter.probability > 0]
        self._orders = torch.tensor(list(permutations(range(len(self._jitter)))), dtype=torch.int64)

    def __call__(self, crops: Tensor, draws: NamedRNG) -> Tensor:
        """Augments and normalizes a batch.

        Args:
            crops: float in [0, 1] or uint8, of shape (B, C, S, S); float crops are overwritten.
            draws: the samples' named draws, on the CPU.

        Returns:
            float32 of the same shape.
        """
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
            "restyle": config.restyle.probability,
            "rotation": config.rotation.probability,
            "grayscale": self._grayscale,
            "blur": config.blur.probability,
            "solarize": config.solarize,
        }
        chances = {name: chance for name, chance in chances.items() if chance > 0}
        ranges = {
            "jitter": (0.0, 1.0),
            "jitter order": (0.0, float(len(self._orders))),
            "rotation degrees": (-config.rotation.degrees, config.rotation.degrees),
            "blur sigma": config.blur.sigma,
            **{name: (neutral - spread, neutral + spread) for name, _, neutral, spread in self._jitter},
            **dict.fromkeys(chances, (0.0, 1.0)),
        }
        if "restyle" in chances:
            assert self._styles is not None
            ranges |= {"style": (0.0, float(len(self._styles))), "style strength": (0.0, config.restyle.strength)}
        names = [_DRAW_NAMES.get(name, name) for name in ranges]
        uniform = dict(zip(ranges, draws.uniforms(names).unbind(1), strict=True))
        drawn = {name: low + (high - low) * uniform[name] for name, (low, high) in ranges.items()}
        drawn |= {name: drawn[name] < chance for name, chance in chances.items()}
        left_out = drawn.pop("jitter") >= config.jitter.probability
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
            images = _where(drawn["grayscale"], images, color.grayscale)
        if "blur" in drawn:
            blur = partial(color.gaussian_blur, greatest=float(drawn["blur sigma"].max()))
            images = _where(drawn["blur"], images, blur, drawn["blur sigma"])
        if "solarize" in drawn:
            images = _where(drawn["solarize"], images, color.solarize)
        torch.mul(images, self._scale.to(images.device), out=out).add_(self._shift.to(images.device))
        if "erasing" in drawn:
            erase_(out, drawn["erasing"].to(images.device))

    def _restyle(self, images: Tensor, style: Tensor, strength: Tensor) -> Tensor:
        assert self._styles is not None
        if self._styles.device != images.device or self._styles.shape[2:] != images.shape[2:]:
            styles = self._styles.to(images.device)
            self._styles = F.interpolate(styles, images.shape[2:], mode="bilinear", antialias=True)
        return color.amplitude_mix(images, self._styles[style.long()], strength).clamp_(0, 1)


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
