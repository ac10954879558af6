"""Heads that stage one drops: projections, predictions and prototypes."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from lightly.models.modules.heads import ProjectionHead
from torch import Tensor, nn


def projection_head(
    in_width: int, hidden_width: int, out_width: int, layers: int = 2, *, norm: bool = True, final_norm: bool = False
) -> nn.Module:
    """Linear, norm and ReLU, and a linear layer last (Chen et al. 2020); (B, in) to (B, out).

    Args:
        in_width: the encoder's features.
        hidden_width: between the layers.
        out_width: where the loss is taken.
        layers: linear layers.
        norm: whether batch norms stand between the layers (MoCo v2 has none).
        final_norm: whether a batch norm follows the last layer (as in the code of SimCLR).
    """
    widths = [in_width, *[hidden_width] * (layers - 1), out_width]
    hidden = [(a, b, nn.BatchNorm1d(b) if norm else None, nn.ReLU()) for a, b in itertools.pairwise(widths[:-1])]
    last_norm = nn.BatchNorm1d(out_width) if final_norm else None
    head: nn.Module = ProjectionHead([*hidden, (widths[-2], widths[-1], last_norm, None)])
    return head


def prediction_head(width: int, hidden_width: int) -> nn.Module:
    """The predictor of methods with two unlike branches (Grill et al. 2020); (B, width) to (B, width)."""
    return projection_head(width, hidden_width, width)


class PrototypeHead(nn.Module):
    """Cosine similarity to learned prototypes (Caron et al. 2020); (B, in_width) to (B, prototypes).

    Only a prototype's direction counts, so nothing has to be normalized after a step.
    """

    def __init__(self, in_width: int, prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(prototypes, in_width), dim=1))

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(F.normalize(rows, dim=1), F.normalize(self.weight, dim=1))


def distillation_head(in_width: int, hidden_width: int, out_width: int, layers: int) -> nn.Module:
    """DINO's head without its last layer: linear and GELU, no norm (Caron et al. 2021); (B, in) to (B, out)."""
    widths = [in_width, *[hidden_width] * (layers - 1), out_width]
    hidden = [(a, b, None, nn.GELU()) for a, b in itertools.pairwise(widths[:-1])]
    head: nn.Module = ProjectionHead([*hidden, (widths[-2], widths[-1], None, None)])
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return head
