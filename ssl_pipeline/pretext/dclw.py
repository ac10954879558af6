"""DCLW: DCL whose positives weigh more the farther apart they are.

    ℓ(i) = −wᵢ zᵢ·zₚ ÷ τ + log Σ_{j≠i,p} exp(zᵢ·zⱼ ÷ τ),   wᵢ = 2 − exp(zᵢ·zₚ ÷ σ) ÷ mean over i of exp(zᵢ·zₚ ÷ σ)

When to use: as DCL, where positives that are still far apart should count more. Yeh et al. 2022, arXiv 2110.06848.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.losses.gather import all_gather_rows
from ssl_pipeline.losses.info_nce import normalize_rows
from ssl_pipeline.pretext import simclr


class DCLW(simclr.SimCLR):
    """See :class:`Config`."""

    config: Config

    def contrast(self, first: Tensor, second: Tensor, temperature: float | Tensor, batch: Batch) -> Tensor:
        loss = super().contrast(first, second, temperature, batch)
        return loss + weighted_positives(first, second, temperature, self.config.sigma)


def weighted_positives(first: Tensor, second: Tensor, temperature: float | Tensor, sigma: float) -> Tensor:
    r"""The mean of :math:`(1 - w_i) s_i / \tau`, which turns DCL's :math:`-s_i / \tau` into :math:`-w_i s_i / \tau`.

    :math:`w_i = 2 - \exp(s_i / \sigma) / \text{mean}_j \exp(s_j / \sigma)` over the pairs of all processes, with rows (B, D). As in the
    authors' code the gradient flows through the weights.
    """
    similarity = (normalize_rows(first) * normalize_rows(second)).sum(1, keepdim=True)
    similarity = all_gather_rows(similarity)[:, 0]
    weights = 2 - len(similarity) * torch.softmax(similarity / sigma, 0)
    return ((1 - weights) * similarity / temperature).mean()


class Config(simclr.Config):
    """Weighted decoupled contrastive learning (Yeh et al. 2022).

    Attributes:
        sigma: how sharply the weights of a von Mises-Fisher density separate near positives from far ones.
    """

    task = DCLW
    decoupled = True
    sigma: float = Field(0.5, gt=0)
