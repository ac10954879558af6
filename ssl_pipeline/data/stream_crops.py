"""A step's samples of a stream, decoded and cropped: the part of streaming that a worker does after it has read a shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.dataset import Sample, StreamDataset
from ssl_pipeline.data.decode import DecodeError, EncodedImage
from ssl_pipeline.rng import derive_seed
from ssl_pipeline.transforms.multi_view import Views

Read = TypeVar("Read")


@dataclass
class StreamCrops:
    """A step's crops, and what could not be decoded.

    Attributes:
        index: the samples' ids, int64 of shape (B,).
        views: per view uint8 of shape (B, C, S, S).
        labels: per sample the number of its class, or None.
        domains: per sample the number of its domain; empty where the stream has none.
        faults: of each image that was left out a sentence.
    """

    index: Tensor
    views: list[Tensor]
    labels: list[int | None]
    domains: list[int]
    faults: list[str]


@dataclass
class _Image:
    """A decoded image, and the size that its boxes are drawn in."""

    number: int
    sample: Sample
    pixels: Image.Image
    height: int
    width: int


def read_stream_crops(
    source: StreamDataset, views: Views, drawn: list[tuple[int, Sample]], epoch: int, with_labels: bool
) -> StreamCrops:
    """Decodes samples, each once for all its views and as small as they allow, and crops them.

    A bad image gives its place to the next good one, under that one's id: a loss can know it for a repeat.

    Raises:
        DecodeError: an image can't be decoded and is not to be skipped, or none can.
        ConfigError: a label or domain is missing.
    """
    faults: list[str] = []

    def borne(read: Callable[[], Read]) -> Read | None:
        try:
            return read()
        except DecodeError as error:
            faults.append(str(error))
            if not source.skip_unreadable or len(faults) == len(drawn):
                raise
            return None

    opened = [borne(partial(EncodedImage, sample.data, Path(sample.name))) for _, sample in drawn]
    sizes = torch.tensor([(1, 1) if one is None else (one.height, one.width) for one in opened])
    ids = torch.tensor([number for number, _ in drawn])
    factors = views.reductions((sizes[:, 0], sizes[:, 1]), ids, epoch)
    images: list[_Image | None] = []
    for (number, sample), one, factor in zip(drawn, opened, factors, strict=True):
        pixels = None if one is None else borne(partial(one.decode, source.channels, factor, source.value_range))
        if one is None or pixels is None:
            images.append(None)
            continue
        height, width = (one.height, one.width) if factor > 1 else (pixels.height, pixels.width)
        images.append(_Image(number, sample, pixels, height, width))
    whole = [next(image for image in [*images[i:], *images[:i]] if image is not None) for i in range(len(images))]
    index = torch.tensor([image.number for image in whole])
    if with_labels:
        without = next((image.sample.name for image in whole if image.sample.label is None), None)
        if without is not None:
            raise ConfigError(f"{without} has no label, and this task reads labels: see `data.label`.")
    domains = [_domain_id(image.sample) for image in whole] if source.has_domains else []
    drawn_in = torch.tensor([image.height for image in whole]), torch.tensor([image.width for image in whole])
    crops = views.of_files([image.pixels for image in whole], index, epoch, drawn_in)
    return StreamCrops(index, crops, [image.sample.label for image in whole], domains, faults)


def _domain_id(sample: Sample) -> int:
    """The number of a sample's domain, the same in each process that meets it."""
    if sample.domain is None:
        raise ConfigError(f"{sample.name} does not say what domain it is from: mend it, or see `data.domain`.")
    return derive_seed("domain", sample.domain)
