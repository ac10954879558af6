"""Decoding the images of a dataset: for a training step's crops, or once and in order for evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.dataset import IndexedDataset, Sample
from ssl_pipeline.data.decode import DecodeError, is_grayscale
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing

NEIGHBORS = 64  # that are tried in the place of a file that can't be decoded


class Readable(Protocol):
    """What :func:`read_crops` needs of a dataset."""

    def sizes(self, index: Tensor) -> tuple[Tensor, Tensor] | None: ...
    def open_reduced(self, index: int, factor: int) -> Image.Image: ...
    def neighbor(self, index: int) -> int: ...


@dataclass
class Crops:
    """This process's share of a step, cropped.

    Attributes:
        index: the samples, int64 of shape (B,); neighbors stand here, too, for those that can't be decoded.
        views: per view uint8, or float32 in [0, 1], of shape (B, C, S, S).
        faults: what is wrong with the samples that were replaced.
        label: int64 of shape (B,), where labels are read.
        domain: int64 of shape (B,), where domains are known.
    """

    index: Tensor
    views: list[Tensor]
    faults: dict[int, DecodeError]
    label: Tensor | None = None
    domain: Tensor | None = None


def read_crops(source: Readable, views: Views, index: Tensor, epoch: int, attempts: int = NEIGHBORS) -> Crops:
    """Decodes samples, each once for all its views and as small as they allow, and crops them.

    A sample that can't be decoded gives its place to its neighbor, under that one's number: a loss can know it for a repeat.

    Raises:
        DecodeError: after so many attempts a place is still empty.
    """
    index, images, faults = index.clone(), dict[int, Image.Image](), dict[int, DecodeError]()
    pending = list(range(len(index)))
    for _ in range(attempts):
        sizes = source.sizes(index)
        factors = [1] * len(index) if sizes is None else views.reductions(sizes, index, epoch)
        failed = []
        for place in pending:
            try:
                images[place] = source.open_reduced(int(index[place]), factors[place])
            except DecodeError as error:
                faults[int(index[place])] = error
                failed.append(place)
        if not failed:
            return Crops(index, views.of_files([images[i] for i in range(len(index))], index, epoch, sizes), faults)
        for place in failed:
            index[place] = source.neighbor(int(index[place]))
        pending = failed
    raise next(reversed(faults.values()))


def note_bad(source: IndexedDataset, sample: int, error: DecodeError) -> None:
    """Counts a sample that was replaced.

    Raises:
        DecodeError: the dataset allows none.
        ConfigError: it allows no more.
    """
    if source.bad_files is None:
        raise error
    source.bad_files.note(source.describe(sample), error.fault)


def open_readable(source: IndexedDataset, index: int) -> Image.Image | None:
    """A decoded image; None for one that can't be decoded, which is counted as :func:`note_bad` does.

    Metrics and probes leave such an image out: a neighbor would be measured against another image's target.
    """
    try:
        return source.open_image(index)
    except DecodeError as error:
        note_bad(source, index, error)
        return None


def open_or_replace(source: IndexedDataset, index: int) -> Image.Image:
    """A decoded image, or that of the nearest neighbor, of the same class, that can be decoded.

    Raises:
        DecodeError: the dataset allows no bad image, or the neighbors can't be decoded either.
        ConfigError: it allows no more.
    """
    for _ in range(NEIGHBORS):
        try:
            return source.open_image(index)
        except DecodeError as error:
            note_bad(source, index, error)
            index, last = source.neighbor(index), error
    raise last


def read_readable(
    source: IndexedDataset,
    preprocessing: Preprocessing,
    device: torch.device,
    index: Tensor,
    chunk: int = 256,
    open_image: Callable[[IndexedDataset, int], Image.Image | None] = open_readable,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Reads samples once, in order, without randomness; those that can't be decoded are left out.

    Args:
        source: numbered samples.
        preprocessing: what is done to the images.
        device: where the images are wanted.
        index: which samples, int64 of shape (N,).
        chunk: samples at a time.
        open_image: decodes one image; None leaves it out.

    Yields:
        The samples that were read, int64 of shape (B,) with B ≤ chunk, and their images, float32 of shape (B, C, size, size).
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for part in index.split(chunk):
            if source.pixels is not None:
                yield part, preprocessing.of_pixels(source.pixels[part].to(device))
                continue
            opened = list(pool.map(partial(open_image, source), part.tolist()))
            images = [image for image in opened if image is not None]
            if images:
                read = torch.tensor([image is not None for image in opened])
                yield part[read], preprocessing.of_files(images).to(device)


def read_in_order(
    source: IndexedDataset,
    preprocessing: Preprocessing,
    device: torch.device,
    index: Tensor | None = None,
    chunk: int = 256,
) -> Iterator[Tensor]:
    """The images of :func:`read_readable`, of all samples by default; neighbors replace those that can't be decoded."""
    index = torch.arange(len(source)) if index is None else index
    for _, images in read_readable(source, preprocessing, device, index, chunk, open_or_replace):
        yield images


def channels_of(samples: Sequence[Sample]) -> int:
    """The channels of all images by a few of them: 1 if all of these are grayscale, 3 otherwise.

    Raises:
        ConfigError: none of them is an image.
    """
    found = set[int]()
    for sample in samples:
        # Decoders answer damaged bytes with nearly any error; training reports it when the image's turn comes.
        with suppress(Exception), Image.open(BytesIO(sample.data)) as image:
            found.add(1 if is_grayscale(image.mode) else 3)
    if not found:
        raise ConfigError(
            f"{samples[0].name} can't be read as an image, so its channels are not known: set `data.channels`, or mend it."
        )
    return max(found)
