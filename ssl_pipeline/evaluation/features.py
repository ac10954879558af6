"""A source's features, each sample exactly once on any number of processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.data.reading import open_or_replace, read_in_order, read_readable
from ssl_pipeline.evaluation.together import gather_parts
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing


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

    A sample that can't be decoded has its neighbor's row. What pairs rows with labels or other targets takes
    :func:`extract_readable`.

    Args:
        network: put into evaluation mode, and back into the mode it was in.
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
    index = torch.arange(len(source)) if index is None else index
    part = index.tensor_split(share.processes)[share.rank]
    was_training = network.training
    network.eval()
    run = forward or network
    batches = read_in_order(source, preprocessing, share.device, part)
    rows = gather_parts((run(images).float().cpu() for images in batches), share)
    network.train(was_training)
    return torch.cat(rows)


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
        float32 of shape (M, D), and the samples that the rows are of, int64 of shape (M,), in the order of ``index``; both on
        the CPU, the same on every process.

    Raises:
        ConfigError: no sample can be decoded.
        CutShortError: a signal has come.
    """
    index = torch.arange(len(source)) if index is None else index
    part = index.tensor_split(share.processes)[share.rank]
    was_training = network.training
    network.eval()
    run = forward or network
    batches = read_readable(source, preprocessing, share.device, part)
    rows = gather_parts(((run(images).float().cpu(), read) for read, images in batches), share)
    network.train(was_training)
    if not rows:
        raise ConfigError(f"{source.name}: none of its {len(index)} images can be read: replace the files.")
    return torch.cat([found for found, _ in rows]), torch.cat([read for _, read in rows])


@torch.no_grad()
def two_views(
    encoder: Encoder, source: IndexedDataset, views: Views, device: torch.device, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Features of two views of the same images; the views of epoch 0, so that figures compare over time.

    Args:
        encoder: put into evaluation mode, and back into the mode it was in.
        source: numbered samples.
        views: the random views, two or more.
        device: where the encoder is.
        index: which samples, few enough for one batch.

    Returns:
        Two tensors of shape (N, width).
    """
    if source.pixels is not None:
        crops = views.of_pixels(source.pixels[index].to(device), index, epoch=0)
    else:
        crops = views.of_files([open_or_replace(source, int(i)) for i in index], index, epoch=0)
        crops = [crop.to(device) for crop in crops]
    finished = views.finish(crops, index, epoch=0)
    was_training = encoder.training
    encoder.eval()
    first, second = encoder.features(finished[0]), encoder.features(finished[views.config.count - 1])
    encoder.train(was_training)
    return first, second
