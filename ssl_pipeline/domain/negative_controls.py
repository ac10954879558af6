"""Negative controls: targets from which nothing can be learned. A gain with them does not come from the target."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from ssl_pipeline.data.dataset import ArrayDataset, IndexedDataset
from ssl_pipeline.data.decode import as_8_bit
from ssl_pipeline.rng import derive_seed

Control = Literal["no_shift", "noise", "shuffled"]


def _noise(image: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, image.shape, generator=generator, dtype=torch.uint8)


def _shuffled(image: Tensor, generator: torch.Generator) -> Tensor:
    """The same colors, and no shape."""
    order = torch.randperm(image.shape[1] * image.shape[2], generator=generator)
    return image.flatten(1)[:, order].view_as(image)


_STAND_INS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"noise": _noise, "shuffled": _shuffled}


def make_control(name: Control, images: IndexedDataset) -> IndexedDataset:
    """As many images of the same sizes, the same at every call: of ``noise``, or with ``shuffled`` pixels."""
    if images.pixels is None:
        return _StandIn(name, images)
    changed = [_changed(name, number, image) for number, image in enumerate(images.pixels)]
    return ArrayDataset(
        images.name, torch.stack(changed), license=images.license, mean=images.mean, std=images.std, domains=images.domains,
        domain_names=images.domain_names,
    )  # fmt: skip


def _changed(name: str, number: int, image: Tensor) -> Tensor:
    """An image, uint8 of shape (C, H, W), changed by draws of its own."""
    return _STAND_INS[name](image, torch.Generator().manual_seed(derive_seed("control", name, number)))


class _StandIn(IndexedDataset):
    """For images in files."""

    def __init__(self, name: str, images: IndexedDataset, numbers: Tensor | None = None) -> None:
        self.name, self.channels, self.license = images.name, images.channels, images.license
        self.domains, self.domain_names, self.bad_files = images.domains, images.domain_names, images.bad_files
        self.mean, self.std = images.mean, images.std
        self._how, self._images = name, images
        self._numbers = torch.arange(len(images)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._images)

    def open_image(self, index: int) -> Image.Image:
        opened = as_8_bit(self._images.open_image(index), "L" if self._images.channels == 1 else "RGB")
        image = pil_to_tensor(opened)
        changed: Image.Image = to_pil_image(_changed(self._how, int(self._numbers[index]), image))
        return changed

    def describe(self, index: int) -> str:
        return self._images.describe(index)

    def fingerprint(self) -> str:
        return hashlib.blake2b(f"{self._how} {self._images.fingerprint()}".encode(), digest_size=16).hexdigest()

    def select(self, index: Tensor) -> _StandIn:
        return _StandIn(self._how, self._images.select(index), self._numbers[index])
