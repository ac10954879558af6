"""The linear probe at several learning rates at once, for more labels than a solver likes: one matrix product for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.rng import permutation
from ssl_pipeline.schedules import warmup_cosine

_MOMENTUM = 0.9


@dataclass(frozen=True)
class Probes:
    """Linear classifiers of the same features, one per learning rate.

    Attributes:
        rates: R learning rates.
        weight: float32 of shape (R, classes, D), for raw features.
        bias: float32 of shape (R, classes).
    """

    rates: tuple[float, ...]
    weight: Tensor
    bias: Tensor

    def predict(self, features: Tensor, which: int) -> Tensor:
        """Logits of one probe: (N, D) to (N, classes)."""
        return F.linear(features.float(), self.weight[which], self.bias[which])


@torch.no_grad()
def sweep(
    features: Tensor,
    labels: Tensor,
    classes: int,
    rates: Sequence[float],
    epochs: int = 50,
    batch: int = 256,
    seed: int = 0,
) -> Probes:
    """Trains one linear classifier per learning rate by SGD with momentum 0.9, a cosine to 0 and no weight decay.

    All rates see the same batches, so a step is one product (batch, D) × (D, R·classes) forward and one backward. Features
    are standardized by their own statistics, and the result is folded back: the probes read raw features.

    Args:
        features: shape (N, D).
        labels: int64 of shape (N,).
        classes: number of classes.
        rates: learning rates, for this batch size and standardized features.
        epochs: passes over the features.
        batch: rows of a step; all rows if there are fewer. An epoch's uneven rest is left out.
        seed: of the order.
    """
    mean, std = features.float().mean(0), features.float().std(0, correction=0).clamp_min(1e-6)
    standard = (features.float() - mean) / std
    batch = min(batch, len(standard))
    steps_per_epoch = len(standard) // batch
    speeds = standard.new_tensor(rates)[:, None].expand(-1, classes).flatten()  # per column of the weight
    weight, bias = standard.new_zeros(standard.shape[1], len(speeds)), standard.new_zeros(len(speeds))
    weight_momentum, bias_momentum = torch.zeros_like(weight), torch.zeros_like(bias)
    for epoch in range(epochs):
        order = permutation(len(standard), seed, "probe", epoch).to(standard.device)
        for step in range(steps_per_epoch):
            chosen = order[step * batch : (step + 1) * batch]
            rows = standard[chosen]
            chances = torch.addmm(bias, rows, weight).unflatten(1, (-1, classes)).softmax(2)
            chances[torch.arange(batch), :, labels[chosen]] -= 1
            gradient = chances.flatten(1).div_(batch)  # of the mean cross-entropy with respect to the logits
            factor = warmup_cosine(epoch * steps_per_epoch + step, epochs * steps_per_epoch, 0, 0.0, 0.0)
            weight_momentum.mul_(_MOMENTUM).add_(rows.T @ gradient)
            bias_momentum.mul_(_MOMENTUM).add_(gradient.sum(0))
            weight.sub_(weight_momentum * (factor * speeds))
            bias.sub_(bias_momentum * (factor * speeds))
    raw = (weight / std[:, None]).T.unflatten(0, (-1, classes))
    return Probes(tuple(rates), raw, bias.unflatten(0, (-1, classes)) - raw @ mean)


def choose(probes: Probes, features: Tensor, labels: Tensor) -> tuple[int, list[float]]:
    """The probe that does best on validation labels (the lowest rate of equals), and the accuracy of each."""
    found = [float((probes.predict(features, i).argmax(1) == labels).float().mean()) for i in range(len(probes.rates))]
    by_rate = sorted(range(len(found)), key=lambda i: probes.rates[i])
    return max(by_rate, key=lambda i: found[i]), found
