"""The views and the training batches of a dataset, whichever kind it is."""

from __future__ import annotations

import torch

from ssl_pipeline.data.dataset import ImageDataset, IndexedDataset
from ssl_pipeline.data.encoded import StreamDataset
from ssl_pipeline.data.loader import DistInfo, IndexedLoader, TrainLoader
from ssl_pipeline.data.reading import read_in_order
from ssl_pipeline.data.stream_loader import StreamLoader
from ssl_pipeline.rng import permutation
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing


def build_views(
    source: ImageDataset,
    config: ViewsConfig,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
) -> Views:
    """The views of a dataset's images; restyled views take the amplitude of images of the same dataset, drawn by the seed.

    Args:
        source: the dataset; of a stream the first images lend their amplitude.
        config: a policy without ``auto``.
        mean: per-channel mean that the encoder expects.
        std: per-channel standard deviation that the encoder expects.
        seed: the run's.
    """
    count = max((view.amplitude_mix.styles for view in config.each() if view.amplitude_mix.probability > 0), default=0)
    if not count:
        return Views(config, mean, std, seed)
    lenders = source.preview()
    index = permutation(len(lenders), seed, "styles")[:count].sort().values
    plain = Preprocessing(config.size, (0.0,) * lenders.channels, (1.0,) * lenders.channels)
    styles = torch.cat(list(read_in_order(lenders, plain, torch.device("cpu"), index)))
    return Views(config, mean, std, seed, styles)


def build_loader(
    source: ImageDataset,
    views: Views,
    batch_size: int,
    seed: int,
    share: DistInfo,
    total_steps: int,
    workers: int | None = None,
    with_labels: bool = False,
) -> TrainLoader:
    """The batches of numbered samples (:class:`IndexedLoader`) or of a stream (:class:`StreamLoader`)."""
    settings = (views, batch_size, seed, share, total_steps, workers, with_labels)
    if isinstance(source, StreamDataset):
        return StreamLoader(source, *settings)
    assert isinstance(source, IndexedDataset)
    return IndexedLoader(source, *settings)
