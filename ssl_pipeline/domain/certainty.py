"""What logits say of their own certainty."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Of the softmax of each row: (N, K) to (N,).

    By log-softmax: the gradient of ``special.entr`` is no number where a share underflows.
    """
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def information_maximization(logits: Tensor) -> Tensor:
    r"""Each row certain, all rows together diverse (Liang et al. 2020, eq. 3); lowest at −log K.

    .. math:: \overline{H(p_i)} - H(\overline{p_i})
    """
    shares = logits.softmax(1).mean(0).clamp_min(torch.finfo(logits.dtype).tiny)
    return entropy(logits).mean() + (shares * shares.log()).sum()


def class_confusion(logits: Tensor, temperature: float) -> Tensor:
    """How often a pair of classes is confused; certain rows count for more (Jin et al. 2020).

    Args:
        logits: shape (N, K), float32.
        temperature: divides the logits.
    """
    logits = logits / temperature
    shares = logits.softmax(1)
    weight = 1 + torch.exp(-entropy(logits).detach())
    weight = len(logits) * weight / weight.sum()
    correlation = shares.T @ (shares * weight[:, None])
    correlation = correlation / correlation.sum(1, keepdim=True)
    return (correlation.sum() - correlation.trace()) / logits.shape[1]
