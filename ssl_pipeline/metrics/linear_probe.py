"""Linear models on fixed features: solved to the minimum of a convex problem, or trained by SGD at several learning rates.

Features are standardized for the fit and the result is folded back, so that each model reads raw features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_pipeline.rng import permutation
from ssl_pipeline.schedules import warmup_cosine


class _Standardized:
    """Features with mean 0 and standard deviation 1, and the way back."""

    def __init__(self, features: Tensor) -> None:
        self.mean, self.std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
        self.rows = (features - self.mean) / self.std

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (…, K, D) and bias (…, K) for raw features, float32, of those for standardized ones."""
        raw = weight.detach() / self.std
        return raw.float(), (bias.detach() - raw @ self.mean).float()


def fit_linear(
    features: Tensor,
    labels: Tensor,
    classes: int,
    decay: float,
    iterations: int = 200,
    class_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression on features (N, D) and labels (N,) by L-BFGS, without any randomness.

    ``decay`` is the weight of ½‖W‖² beside the mean cross-entropy, in which each class's samples have a ``class_weight`` (classes,).

    Returns:
        Weight of shape (classes, D) and bias of shape (classes,), float32.
    """
    weights = None if class_weight is None else class_weight.double()
    return _lbfgs(features, classes, lambda logits: F.cross_entropy(logits, labels, weights), decay, iterations)


def fit_labels(features: Tensor, targets: Tensor, decay: float, iterations: int = 200) -> tuple[Tensor, Tensor]:
    """One logistic regression per label, all at once; arguments and result as of :func:`fit_ridge`, targets 0 and 1."""

    def loss(logits: Tensor) -> Tensor:
        return known_mean(F.binary_cross_entropy_with_logits, logits, targets.double()).sum()

    return _lbfgs(features, targets.shape[1], loss, decay, iterations)


def _lbfgs(
    features: Tensor, outputs: int, loss_of: Callable[[Tensor], Tensor], decay: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """Minimizes a loss of the logits (N, outputs) plus ``decay``·½‖W‖²."""
    standard = _Standardized(features.double())
    weight = standard.rows.new_zeros(outputs, features.shape[1], requires_grad=True)
    bias = standard.rows.new_zeros(outputs, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(standard.rows @ weight.T + bias) + 0.5 * decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return standard.fold(weight, bias)


def fit_ridge(features: Tensor, targets: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Least squares with ``decay``·‖w‖² beside each column's mean squared error; the bias is free.

    From features (N, D) and targets (N, K), NaN where not known, to weight (K, D) and bias (K,), float32.
    """
    standard = _Standardized(features.double())
    weights, biases = [], []
    for column in targets.double().unbind(1):
        known = ~column.isnan()
        rows, values = standard.rows[known], column[known]
        rows_mean, value_mean = rows.mean(0), values.mean()
        centered = rows - rows_mean
        penalty = decay * len(rows) * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        weights.append(torch.linalg.solve(centered.T @ centered + penalty, centered.T @ (values - value_mean)))
        biases.append(value_mean - rows_mean @ weights[-1])
    return standard.fold(torch.stack(weights), torch.stack(biases))


def known_mean(loss, predictions: Tensor, targets: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Each column's mean (K,) of a functional loss over the rows (N, K) whose target is known (not NaN); 0 where none is."""
    known = ~targets.isnan()
    losses = loss(predictions, targets.nan_to_num(), reduction="none") * known
    columns: Tensor = losses.sum(0) / known.sum(0).clamp_min(1)
    return columns


@dataclass(frozen=True)
class Probes:
    """Linear classifiers of R learning rates on raw features: weight (R, classes, D) and bias (R, classes), float32."""

    rates: tuple[float, ...]
    weight: Tensor
    bias: Tensor

    def predict(self, features: Tensor, which: int) -> Tensor:
        return F.linear(features.float(), self.weight[which], self.bias[which])

    def choose(self, features: Tensor, labels: Tensor) -> tuple[int, list[float]]:
        """The probe that does best on validation labels (the lowest rate of equals), and the accuracy of each."""
        found = [float((self.predict(features, i).argmax(1) == labels).float().mean()) for i in range(len(self.rates))]
        return max(range(len(found)), key=lambda i: (found[i], -self.rates[i])), found


def sgd_probes(
    features: Tensor,
    labels: Tensor,
    classes: int,
    rates: Sequence[float],
    epochs: int = 50,
    batch: int = 256,
    seed: int = 0,
) -> Probes:
    """Trains one linear classifier per learning rate by SGD with momentum 0.9, a cosine to 0 and no weight decay.

    All rates see the same batches, so that a step is one product (batch, D) × (D, R·classes). An epoch's uneven rest is left out.
    """
    standard = _Standardized(features.float())
    batch = min(batch, len(features))
    steps = len(features) // batch
    probes = [nn.Linear(features.shape[1], classes, device=features.device) for _ in rates]
    for parameter in (p for probe in probes for p in probe.parameters()):
        nn.init.zeros_(parameter)
    groups = [{"params": probe.parameters(), "lr": rate} for probe, rate in zip(probes, rates, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, max(1, epochs * steps), 0, 0.0, 0.0)
    )
    with torch.enable_grad():
        for epoch in range(epochs):
            order = permutation(len(features), seed, "probe", epoch).to(features.device)
            for chosen in order[: steps * batch].split(batch):
                weight, bias = (torch.cat([getattr(probe, name) for probe in probes]) for name in ("weight", "bias"))
                logits = F.linear(standard.rows[chosen], weight, bias).unflatten(1, (-1, classes))
                targets = labels[chosen].repeat_interleave(len(rates))
                loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / batch
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    weight, bias = (torch.stack([getattr(probe, name) for probe in probes]) for name in ("weight", "bias"))
    return Probes(tuple(rates), *standard.fold(weight, bias))
