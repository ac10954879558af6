"""Views that take on the styles of other images of the data: which images those are."""

from __future__ import annotations

import torch

from ssl_pipeline.data.dataset import ImageDataset
from ssl_pipeline.data.loader import read_in_order
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
    """The views of a source's images; where they are restyled, in styles of the same source, drawn by the seed.

    Args:
        source: whose images; of a stream the first ones lend their styles.
        config: a settled policy.
        mean: per-channel mean that the encoder expects.
        std: per-channel standard deviation that the encoder expects.
        seed: the run's.
    """
    count = max((view.restyle.styles for view in config.each() if view.restyle.probability > 0), default=0)
    if not count:
        return Views(config, mean, std, seed)
    lenders = source.preview()
    index = permutation(len(lenders), seed, "styles")[:count].sort().values
    plain = Preprocessing(config.size, (0.0,) * lenders.channels, (1.0,) * lenders.channels)
    styles = torch.cat(list(read_in_order(lenders, plain, torch.device("cpu"), index)))
    return Views(config, mean, std, seed, styles)
