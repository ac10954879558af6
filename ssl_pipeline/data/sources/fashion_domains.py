"""Domains made of the images that travel with the package: the same classes of clothes in four appearances.

They are synthetic: a rule makes them, and what helps across them need not help across real domains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data import embedded
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.source import SourceConfig
from ssl_pipeline.data.sources.fashion_mnist import read_splits
from ssl_pipeline.data.splits import Split, draw_name, stratified_split
from ssl_pipeline.rng import NamedRNG, permutation
from ssl_pipeline.transforms.config import ViewConfig

_WAVES = 3
_LICENSE = "MIT; the domains are synthetic, made by a rule"


def _original(pixels: Tensor, draws: NamedRNG) -> Tensor:
    """As they are."""
    del draws
    return pixels


def _textured(pixels: Tensor, draws: NamedRNG) -> Tensor:
    """The black background becomes a sum of waves, of each image its own."""
    places = torch.arange(pixels.shape[-1], dtype=torch.float32)
    texture = torch.zeros(len(pixels), pixels.shape[-2], pixels.shape[-1])
    for wave in range(_WAVES):
        angle = draws.uniform(f"angle {wave}", 0, math.pi)[:, None, None]
        length = draws.uniform(f"length {wave}", 3, 12)[:, None, None]
        phase = draws.uniform(f"phase {wave}", 0, 2 * math.pi)[:, None, None]
        along = places[None, :, None] * angle.sin() + places[None, None, :] * angle.cos()
        texture += torch.sin(2 * math.pi * along / length + phase) / _WAVES
    cover = (pixels[:, 0].float() / 64).clamp(0, 1)
    mixed = cover * pixels[:, 0].float() + (1 - cover) * (64 + 60 * texture)
    return mixed.round().clamp(0, 255).to(torch.uint8)[:, None]


def _inverted(pixels: Tensor, draws: NamedRNG) -> Tensor:
    """Black becomes white."""
    del draws
    return 255 - pixels


def _edges(pixels: Tensor, draws: NamedRNG) -> Tensor:
    """The length of the gradient by Sobel's kernels."""
    del draws
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack([across, across.T])[:, None] / 4
    gradient = F.conv2d(F.pad(pixels.float(), (1, 1, 1, 1), mode="replicate"), kernels)
    return gradient.square().sum(1, keepdim=True).sqrt().round().clamp(0, 255).to(torch.uint8)


_APPEARANCES: dict[str, Callable[[Tensor, NamedRNG], Tensor]] = {
    "original": _original, "textured": _textured, "inverted": _inverted, "edges": _edges,
}  # fmt: skip
DOMAINS = tuple(_APPEARANCES)


class Config(SourceConfig):
    """Four synthetic domains of Fashion-MNIST's classes: original, textured background, inverted, edges.

    Each domain has 2,000 training images of its own, whatever domains are chosen: an image of one is never an image of another
    in other clothes. The 2,000 test images are shown in every domain, so that domains are compared on the same images.

    Attributes:
        domains: those to take.
        val: training images of all four domains that are held out for choices, a quarter of each.
        imbalance: per domain how many times fewer images its last class has than its first one, in every split (the classes
            between in equal ratios): a shift of the labels. Domains that are not named keep all their images.
    """

    domains: tuple[str, ...] = Field(DOMAINS, min_length=1)
    val: int = Field(1000, ge=4, le=4000, multiple_of=4)
    imbalance: dict[str, float] = Field(default_factory=dict)

    @field_validator("domains", "imbalance")
    @classmethod
    def _known(cls, value: tuple[str, ...] | dict[str, float]) -> tuple[str, ...] | dict[str, float]:
        unknown = [name for name in value if name not in DOMAINS]
        if unknown:
            raise ValueError(f"there is no domain {', '.join(map(repr, unknown))}: known are {', '.join(DOMAINS)}.")
        if isinstance(value, dict) and any(ratio < 1 for ratio in value.values()):
            raise ValueError("an imbalance is how many times fewer: 1 or more.")
        return value

    def open(self, split: Split) -> ArrayDataset:
        """A split; the same for every seed."""
        every = _every_split(self.val)[split]
        assert every.domains is not None
        wanted = torch.isin(every.domains, torch.tensor([DOMAINS.index(name) for name in self.domains]))
        for name, ratio in self.imbalance.items():
            wanted &= (every.domains != DOMAINS.index(name)) | _thinned(every, DOMAINS.index(name), ratio)
        if not bool(wanted.any()):
            raise ConfigError("`data.imbalance` leaves no image: take a smaller ratio.")
        return every.select(wanted.nonzero()[:, 0])

    def shown_by_views(self, views: Sequence[ViewConfig], hidden: Collection[str]) -> list[str]:
        """Solarizing inverts what is bright: it is the shift to ``inverted``."""
        if "inverted" not in hidden or not any(view.solarize for view in views):
            return []
        return [
            "`transform.solarize` inverts images, and that is what the domain inverted is: training would be shown it, and a gain there "
            "would mean nothing. Set it to 0 (also in `transform.second_view` and `transform.local_views`)."
        ]


def _thinned(source: ArrayDataset, domain: int, ratio: float) -> Tensor:
    """Which images of a domain stay when its classes get rarer from the first to the last."""
    assert source.labels is not None
    assert source.classes is not None
    assert source.domains is not None
    stays = torch.zeros(len(source), dtype=torch.bool)
    for label in range(len(source.classes)):
        members = ((source.domains == domain) & (source.labels == label)).nonzero()[:, 0]
        share = ratio ** (-label / (len(source.classes) - 1))
        stays[members[: max(1, round(share * len(members)))]] = True
    return stays


@lru_cache(maxsize=2)
def _every_split(val: int) -> dict[Split, ArrayDataset]:
    """All domains of all splits, each with the mean and standard deviation of the original training images."""
    assert embedded.__file__ is not None
    splits = read_splits("embedded", Path(embedded.__file__).parent, val)
    made: dict[Split, ArrayDataset] = {}
    for split in ("train", "val"):
        parts = _parts(splits[split], len(DOMAINS))
        made[split] = _dress(splits[split], parts, split)
    made["test"] = _dress(splits["test"], [torch.arange(len(splits["test"]))] * len(DOMAINS), "test")
    return made


def _parts(source: ArrayDataset, count: int) -> list[Tensor]:
    """Shares the images out among so many parts of equal size, each with its share of every class."""
    assert source.labels is not None
    left, parts = torch.arange(len(source)), []
    for part in range(count - 1):
        rest, taken = stratified_split(source.labels[left], len(source) // count, "fashion domains", part)
        parts.append(left[taken])
        left = left[rest]
    return [*parts, left]


def _dress(source: ArrayDataset, parts: list[Tensor], split: Split) -> ArrayDataset:
    """One source of all domains: part i of the images in appearance i."""
    assert source.pixels is not None
    assert source.labels is not None
    pixels = [
        make(source.pixels[part], NamedRNG(part, 0, f"fashion domains {draw_name(split)}"))
        for make, part in zip(_APPEARANCES.values(), parts, strict=True)
    ]
    domains = torch.cat([torch.full((len(part),), number) for number, part in enumerate(parts)])
    # In no order of domains, as if found so: what reads only some of the images reads some of each domain.
    order = permutation(len(domains), "fashion domains", draw_name(split))
    return ArrayDataset(
        "fashion_domains", torch.cat(pixels)[order], source.labels[torch.cat(parts)][order], source.classes, _LICENSE,
        source.mean, source.std, domains[order], DOMAINS,
    )  # fmt: skip
