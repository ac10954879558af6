"""BatchNorm's running statistics, estimated anew."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.data.reading import read_in_order
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.norms import batch_norms
from ssl_pipeline.rng import permutation
from ssl_pipeline.transforms.preprocessing import Preprocessing


@torch.no_grad()
def estimate_statistics(
    network: nn.Module,
    forward: Callable[[Tensor], Tensor],
    source: IndexedDataset,
    preprocessing: Preprocessing,
    share: DistInfo,
) -> None:
    """Sets every BatchNorm's mean and variance to those of a source's images; nothing else of the network changes.

    An encoder that keeps its statistics (:class:`ssl_pipeline.models.encoder.Encoder`) keeps them here too.

    Every process reads all images, so that all get the same statistics.

    Args:
        network: whose layers.
        forward: runs it on images.
        source: numbered samples.
        preprocessing: what the network expects.
        share: gives the device.
    """
    keepers = [m for m in network.modules() if isinstance(m, Encoder) and m.keeps_statistics]
    kept = {id(layer) for encoder in keepers for layer in batch_norms(encoder)}
    layers = [layer for layer in batch_norms(network) if id(layer) not in kept]
    was_training, momenta = network.training, [layer.momentum for layer in layers]
    network.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # torch's cumulative mean over the batches
        layer.train()
    # Drawn, because images may come class by class: a part of one class varies less than all images do. Even parts weigh the same.
    order = permutation(len(source), "BatchNorm statistics")
    for part in order.tensor_split(max(1, len(source) // 256)):
        images = torch.cat(list(read_in_order(source, preprocessing, share.device, part, chunk=len(part))))
        forward(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    network.train(was_training)
