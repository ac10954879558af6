"""Decoding the images of a dataset once and in order, without randomness: for evaluation and prediction."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.decode import is_grayscale
from ssl_pipeline.data.encoded import Sample
from ssl_pipeline.transforms.preprocessing import Preprocessing


def read_readable(
    source: IndexedDataset,
    preprocessing: Preprocessing,
    device: torch.device,
    index: Tensor,
    chunk: int = 256,
    open_image: Callable[[int], Image.Image | None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Reads samples; those that can't be decoded are left out.

    ``index`` are the samples, int64 of shape (N,), of which ``chunk`` are read at a time. ``open_image`` may decode them in place of
    :meth:`IndexedDataset.open_readable`.

    Yields:
        The samples that were read, int64 of shape (B,) with B ≤ chunk, and their images, float32 of shape (B, C, size, size).
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for part in index.split(chunk):
            if source.pixels is not None:
                yield part, preprocessing.of_pixels(source.pixels[part].to(device))
                continue
            opened = list(pool.map(open_image or source.open_readable, part.tolist()))
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
    for _, images in read_readable(source, preprocessing, device, index, chunk, source.open_or_replace):
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
