"""DCL: SimCLR without the positive in the denominator, so that an easy positive does not quiet the negatives.

    ℓ(i) = −zᵢ·zₚ ÷ τ + log Σ_{j≠i,p} exp(zᵢ·zⱼ ÷ τ)

When to use: where batches are small, and SimCLR's positive takes much of its own denominator. Yeh et al. 2022, arXiv
2110.06848.
"""

from __future__ import annotations

from ssl_pipeline.pretext import simclr


class Config(simclr.Config):
    """Decoupled contrastive learning (Yeh et al. 2022): learns from small batches. The loss can be negative."""

    decoupled = True
