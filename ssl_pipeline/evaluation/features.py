"""A source's features, each sample exactly once on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.data.reading import read_in_order, read_readable
from ssl_pipeline.engine.signals import CutShortError, overdue
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing

T = TypeVar("T")


def gather_parts(parts: Iterable[T], share: DistInfo) -> list[T]:
    """Makes this process's parts one by one, and gathers all processes', by rank, the same on every process.

    Raises:
        CutShortError: on every process, when one of them got a signal.
    """
    mine, signal = list[T](), 0
    for part in parts:
        mine.append(part)
        signal = overdue()
        if signal:
            break
    everyones = [(signal, mine)]
    if share.processes > 1:
        everyones *= share.processes
        dist.all_gather_object(everyones, (signal, mine))
    stopped = max(number for number, _ in everyones)
    if stopped:
        raise CutShortError(stopped)
    return [part for _, parts_of_rank in everyones for part in parts_of_rank]


@torch.no_grad()
def extract(
    network: nn.Module,
    source: IndexedDataset,
    preprocessing: Preprocessing,
    share: DistInfo,
    index: Tensor | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Runs a network over samples without randomness, and gathers the outputs in the samples' order.

    A sample that can't be decoded has its neighbor's row: where rows are paired with labels, take :func:`extract_readable`.

    Args:
        network: is in evaluation mode meanwhile.
        source: numbered samples.
        preprocessing: what the network expects.
        share: this process's share: the samples are cut into as many contiguous parts as there are processes.
        index: which samples, int64 of shape (N,); all by default.
        forward: images (B, C, H, W) to rows (B, D); the network itself by default.

    Returns:
        float32 of shape (N, D), on the CPU, the same on every process.

    Raises:
        CutShortError: a signal has come.
    """
    run, batches = forward or network, read_in_order(source, preprocessing, share.device, _part(source, index, share))
    with evaluating(network):
        return torch.cat(gather_parts((run(images).float().cpu() for images in batches), share))


@torch.no_grad()
def extract_readable(
    network: nn.Module,
    source: IndexedDataset,
    preprocessing: Preprocessing,
    share: DistInfo,
    index: Tensor | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`extract`, without the samples that can't be decoded.

    Returns:
        float32 of shape (M, D), and the samples that the rows are of, int64 of shape (M,), in the order of ``index``.

    Raises:
        ConfigError: no sample can be decoded.
        CutShortError: a signal has come.
    """
    run, batches = forward or network, read_readable(source, preprocessing, share.device, _part(source, index, share))
    with evaluating(network):
        rows = gather_parts(((run(images).float().cpu(), read) for read, images in batches), share)
    if not rows:
        count = len(source) if index is None else len(index)
        raise ConfigError(f"{source.name}: none of its {count} images can be read: replace the files.")
    return torch.cat([found for found, _ in rows]), torch.cat([read for _, read in rows])


def _part(source: IndexedDataset, index: Tensor | None, share: DistInfo) -> Tensor:
    index = torch.arange(len(source)) if index is None else index
    return index.tensor_split(share.processes)[share.rank]


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back into the mode that the network was in."""
    was_training = network.training
    network.eval()
    yield
    network.train(was_training)


@torch.no_grad()
def two_views(
    encoder: Encoder, source: IndexedDataset, views: Views, device: torch.device, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Features (N, width) of two random views of a batch of images: those of epoch 0, so that metrics compare over time."""
    if source.pixels is not None:
        crops = views.of_pixels(source.pixels[index].to(device), index, epoch=0)
    else:
        crops = views.of_files([source.open_or_replace(int(i)) for i in index], index, epoch=0)
        crops = [crop.to(device) for crop in crops]
    finished = views.finish(crops, index, epoch=0)
    with evaluating(encoder):
        return encoder.features(finished[0]), encoder.features(finished[views.config.num_views - 1])


def class_name(source: IndexedDataset, sample: int) -> str | None:
    """The name of an image's class; None where it is not known."""
    if source.labels is None or source.classes is None or int(source.labels[sample]) < 0:
        return None
    return source.classes[int(source.labels[sample])]


def one_of_each_class(source: IndexedDataset, index: Tensor) -> list[int]:
    """Places in ``index``: the first of each class, in the order of the classes, then whatever is left."""
    labels = [] if source.labels is None else source.labels[index].tolist()
    first = {label: labels.index(label) for label in sorted(set(labels)) if label >= 0}
    chosen = set(first.values())
    return [*first.values(), *(place for place in range(len(index)) if place not in chosen)]
