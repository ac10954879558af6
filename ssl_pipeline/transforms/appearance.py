"""What follows the crop: restyling, rotation, color jitter, grayscale, blur, solarize, normalization, erasing, on views of one size.

The draws are made on the CPU, whatever the device: it is known there which samples an operation spares, and nothing waits
for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.rng import NamedRNG
from ssl_pipeline.transforms import photometry
from ssl_pipeline.transforms.config import ViewConfig
from ssl_pipeline.transforms.geometry import cache_parts, erase_, random_boxes, rotate
from ssl_pipeline.transforms.style import restyle

Drawn = dict[str, Tensor]

_SPARED = -1  # in place of an operation's number: the sample is not jittered


class Augmentation:
    """Gives the crops of one view their final looks.

    Args:
        config: the view's policy, without ``auto``.
        mean: per-channel mean that the encoder expects.
        std: per-channel standard deviation that the encoder expects.
        styles: images in [0, 1], shape (N, C, S, S) with any S, that lend their style; needed where the view is restyled.
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
            ("brightness", photometry.brightness, 1.0, jitter.brightness),
            ("contrast", photometry.contrast, 1.0, jitter.contrast),
            ("saturation", photometry.saturation, 1.0, jitter.saturation),
            ("hue", photometry.hue, 0.0, jitter.hue),
        ]
        self._jitter = [operation for operation in operations if operation[3] > 0 and jitter.probability > 0]
        self._orders = torch.tensor(list(permutations(range(len(self._jitter)))), dtype=torch.int64)

    def __call__(self, crops: Tensor, draws: NamedRNG) -> Tensor:
        """Finishes a batch.

        Args:
            crops: float in [0, 1] or uint8, of shape (B, C, S, S); float ones are worked on in place.
            draws: the samples' named draws, on the CPU.

        Returns:
            float32 of the same shape, normalized.
        """
        finished = torch.empty(crops.shape, device=crops.device)
        # Saves autograd's share of each small operation; ``finished`` was made outside, so a network may train on it.
        with torch.inference_mode():
            drawn = self._draw(draws, crops.shape[-1])
            for rows in cache_parts(crops):
                self._finish(crops[rows], {name: values[rows] for name, values in drawn.items()}, finished[rows])
        return finished

    def _draw(self, draws: NamedRNG, size: int) -> Drawn:
        """What is to be done to each sample; an operation that the policy never does is not there."""
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
        uniform = dict(zip(ranges, draws.uniforms(list(ranges)).unbind(1), strict=True))
        drawn = {name: low + (high - low) * uniform[name] for name, (low, high) in ranges.items()}
        drawn |= {name: drawn[name] < chance for name, chance in chances.items()}
        spared = drawn.pop("jitter") >= config.jitter.probability
        drawn["order"] = self._orders[drawn.pop("jitter order").long()].masked_fill(spared[:, None], _SPARED)
        if config.erasing.probability > 0:
            sides = torch.full_like(draws.index, size)
            boxes, fit = random_boxes(draws, "erasing", sides, sides, config.erasing)
            drawn["erasing"] = boxes * (draws.happens("erasing", config.erasing.probability) & fit)[:, None]
        return drawn

    def _finish(self, crops: Tensor, drawn: Drawn, out: Tensor) -> None:
        """Finishes a part of a batch into ``out``, whose last operation writes it."""
        images = crops.float().div_(255) if crops.dtype == torch.uint8 else crops
        if "restyle" in drawn:
            images = _where(drawn["restyle"], images, self._restyle, drawn["style"], drawn["style strength"])
        if "rotation" in drawn:
            images = _where(drawn["rotation"], images, rotate, drawn["rotation degrees"])
        # What is first, second, … differs between samples: each place takes those together that have it in common.
        for place in drawn["order"].unbind(1):
            for number in set(place.tolist()) - {_SPARED}:
                name, operation, _, _ = self._jitter[number]
                images = _where(place == number, images, operation, drawn[name])
        if "grayscale" in drawn:
            images = _where(drawn["grayscale"], images, photometry.grayscale)
        if "blur" in drawn:
            blur = partial(photometry.gaussian_blur, greatest=float(drawn["blur sigma"].max()))
            images = _where(drawn["blur"], images, blur, drawn["blur sigma"])
        if "solarize" in drawn:
            images = _where(drawn["solarize"], images, photometry.solarize)
        torch.mul(images, self._scale.to(images.device), out=out).add_(self._shift.to(images.device))
        if "erasing" in drawn:
            erase_(out, drawn["erasing"].to(images.device))

    def _restyle(self, images: Tensor, style: Tensor, strength: Tensor) -> Tensor:
        assert self._styles is not None
        if self._styles.device != images.device or self._styles.shape[2:] != images.shape[2:]:
            styles = self._styles.to(images.device)
            self._styles = F.interpolate(styles, images.shape[2:], mode="bilinear", antialias=True)
        return restyle(images, self._styles[style.long()], strength).clamp_(0, 1)


def _where(chosen: Tensor, images: Tensor, operation: Callable[..., Tensor], *strengths: Tensor) -> Tensor:
    """Applies an operation to the chosen samples; ``chosen`` and the strengths are on the CPU. May overwrite the images."""
    rows = chosen.nonzero()[:, 0]
    if len(rows) == 0:
        return images
    given = [strength.index_select(0, rows).to(images.device) for strength in strengths]
    if len(rows) == len(images):
        return operation(images, *given)
    rows = rows.to(images.device)
    return images.index_copy_(0, rows, operation(images.index_select(0, rows), *given))
