"""Batch norms: the layers with running statistics of the training images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms that have running statistics."""
    return [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def norms_with_statistics(network: nn.Module) -> list[nn.Module]:
    """All layers that have running statistics: BatchNorms, and those norms of timm's that are of another class."""
    return [module for module in network.modules() if running_statistics(module, recurse=False)]


def running_statistics(network: nn.Module, recurse: bool = True) -> list[Tensor]:
    """The buffers that a forward pass in training mode moves."""
    names = ("running_", "num_batches_tracked")
    buffers = network.named_buffers(recurse=recurse)
    return [buffer for name, buffer in buffers if name.rpartition(".")[2].startswith(names)]


def have_statistics(network: nn.Module) -> bool:
    """Whether any BatchNorm has statistics of images: fresh ones have mean 0 and variance 1."""
    return any(
        bool((norm.running_mean != 0).any() or (norm.running_var != 1).any())
        for norm in batch_norms(network)
        if norm.running_mean is not None and norm.running_var is not None
    )
