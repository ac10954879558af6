"""Heads: the last layers, which turn features into the prediction."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from lightly.models.modules.heads import ProjectionHead
from torch import Tensor, nn


def projection_head(
    in_width: int, hidden_width: int, out_width: int, layers: int = 2, final_norm: bool = False
) -> nn.Module:
    """Stage one's head: linear, norm and ReLU, and a linear layer last (Chen et al. 2020); (B, in) to (B, out).

    Args:
        in_width: the encoder's features.
        hidden_width: between the layers.
        out_width: where the loss is taken.
        layers: linear layers; 1 is a single linear layer.
        final_norm: whether a batch norm follows the last layer (as in Chen et al. 2020, SimCLR's code).
    """
    widths = [in_width, *[hidden_width] * (layers - 1), out_width]
    hidden = [(a, b, nn.BatchNorm1d(b), nn.ReLU()) for a, b in itertools.pairwise(widths[:-1])]
    norm = nn.BatchNorm1d(out_width) if final_norm else None
    head: nn.Module = ProjectionHead([*hidden, (widths[-2], widths[-1], norm, None)])
    return head


def prediction_head(width: int, hidden_width: int) -> nn.Module:
    """The predictor of methods with two unlike branches (Grill et al. 2020); (B, width) to (B, width)."""
    return projection_head(width, hidden_width, width)


class LinearHead(nn.Linear):
    """One linear layer, starting near zero so that its first gradient tells the classes apart and no more."""

    def __init__(self, in_width: int, classes: int) -> None:
        super().__init__(in_width, classes)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)


class CosineHead(nn.Module):
    """Cosine similarity to one weight per class, over a temperature (Gidaris and Komodakis 2018).

    Args:
        in_width: features.
        classes: number of classes.
        temperature: divides the similarities.
    """

    def __init__(self, in_width: int, classes: int, temperature: float = 0.05) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, in_width))
        self.temperature = temperature

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_width) to logits (B, classes)."""
        return F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1)) / self.temperature


class DenseHead(nn.Sequential):
    """A prediction for every pixel of a feature map: 3×3 convolution, norm, ReLU, 1×1 convolution."""

    def __init__(self, in_width: int, classes: int) -> None:
        hidden = max(in_width // 4, 1)
        super().__init__(
            nn.Conv2d(in_width, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, classes, 1),
        )
