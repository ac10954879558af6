"""Heads for numbers, solved on fixed features: ridge regression, and one logistic regression a label.

As in :mod:`ssl_pipeline.metrics.linear_probe`, features are standardized for the fit and the result is folded back. A target of
NaN is not known and counts for nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _standardized(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    features = features.double()
    mean, std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    return (features - mean) / std, mean, std


def fit_ridge(features: Tensor, targets: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Least squares with ``decay``·‖w‖² beside each column's mean squared error; the bias is free.

    Args:
        features: shape (N, D).
        targets: shape (N, K), NaN where not known.
        decay: weight of the penalty.

    Returns:
        Weight of shape (K, D) and bias of shape (K,), float32.
    """
    standard, mean, std = _standardized(features)
    weights, biases = [], []
    for column in targets.double().unbind(1):
        known = ~column.isnan()
        rows, values = standard[known], column[known]
        rows_mean, value_mean = rows.mean(0), values.mean()
        centered = rows - rows_mean
        penalty = decay * len(rows) * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        weight = torch.linalg.solve(centered.T @ centered + penalty, centered.T @ (values - value_mean)) / std
        weights.append(weight)
        biases.append(value_mean - (rows_mean * std + mean) @ weight)
    return torch.stack(weights).float(), torch.stack(biases).float()


def fit_labels(features: Tensor, targets: Tensor, decay: float, iterations: int = 200) -> tuple[Tensor, Tensor]:
    """One logistic regression a label, all at once, by L-BFGS.

    Args:
        features: shape (N, D).
        targets: 0 and 1, shape (N, K), NaN where not known.
        decay: weight of ½‖w‖² beside each label's mean cross-entropy.
        iterations: most L-BFGS iterations.

    Returns:
        Weight of shape (K, D) and bias of shape (K,), float32.
    """
    standard, mean, std = _standardized(features)
    targets = targets.double()
    weight = standard.new_zeros(targets.shape[1], features.shape[1], requires_grad=True)
    bias = standard.new_zeros(targets.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = known_mean(F.binary_cross_entropy_with_logits, standard @ weight.T + bias, targets).sum()
        loss = loss + 0.5 * decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        raw = weight / std
        return raw.float(), (bias - raw @ mean).float()


def known_mean(loss, predictions: Tensor, targets: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Each column's mean loss over the rows whose target is known, of shape (K,); 0 where none is.

    Args:
        loss: of torch's functional losses, with ``reduction``.
        predictions: shape (N, K).
        targets: shape (N, K), NaN where not known.
    """
    known = ~targets.isnan()
    losses = loss(predictions, targets.nan_to_num(), reduction="none") * known
    columns: Tensor = losses.sum(0) / known.sum(0).clamp_min(1)
    return columns
