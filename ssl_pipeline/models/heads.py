"""Heads of stage two: the last layer, which turns features into the prediction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearHead(nn.Linear):
    """One linear layer that starts near zero, so that its first gradient depends on the classes alone."""

    def __init__(self, in_width: int, classes: int) -> None:
        super().__init__(in_width, classes)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def assign(self, weight: Tensor, bias: Tensor) -> None:
        """Copies a solved weight (classes, in_width) and bias (classes,) in."""
        self.weight.copy_(weight)
        self.bias.copy_(bias)


class CosineHead(nn.Module):
    """Cosine similarity to one weight per class, divided by a temperature (Gidaris and Komodakis 2018)."""

    def __init__(self, in_width: int, classes: int, temperature: float = 0.05) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, in_width))
        self.temperature = temperature

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_width) to logits (B, classes)."""
        return F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1)) / self.temperature
