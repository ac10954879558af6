"""The linear probe: multinomial logistic regression on fixed features, a convex problem solved to its minimum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fit_linear(
    features: Tensor,
    labels: Tensor,
    classes: int,
    decay: float,
    iterations: int = 200,
    class_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fits a linear classifier by L-BFGS, without any randomness.

    Features are standardized for the fit and the result is folded back, so that the returned layer reads raw features.

    Args:
        features: shape (N, D).
        labels: int64 of shape (N,).
        classes: number of classes.
        decay: weight of ½‖W‖² beside the mean cross-entropy.
        iterations: most L-BFGS iterations.
        class_weight: of each class's samples, shape (classes,); all alike by default.

    Returns:
        Weight of shape (classes, D) and bias of shape (classes,), float32.
    """
    features = features.double()
    mean, std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    standard = (features - mean) / std
    weight = standard.new_zeros(classes, features.shape[1], requires_grad=True)
    bias = standard.new_zeros(classes, requires_grad=True)
    weights = None if class_weight is None else class_weight.double()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(standard @ weight.T + bias, labels, weights) + 0.5 * decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        raw = weight / std
        return raw.float(), (bias - raw @ mean).float()
