"""DCL: SimCLR without the positive in the denominator, so that an easy positive does not quiet the negatives.

    ℓ(i) = −zᵢ·zₚ ÷ τ + log Σ_{j≠i,p} exp(zᵢ·zⱼ ÷ τ)

When to use: where batches are small, and SimCLR's positive takes much of its own denominator. Yeh et al. 2022, arXiv
2110.06848.
"""

from __future__ import annotations

from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ImageDataset
from ssl_pipeline.losses.info_nce import two_view_info_nce
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.pretext import simclr
from ssl_pipeline.pretext._projected import ContrastiveConfig


class Config(ContrastiveConfig):
    """Decoupled contrastive learning (Yeh et al. 2022): learns from small batches. The loss can be negative."""

    def build(self, encoder: Encoder, source: ImageDataset) -> DCL:
        """The task around an encoder."""
        self.check_domains(source.has_domains)
        return DCL(self, encoder)


class DCL(simclr.SimCLR):
    """See :class:`Config`."""

    def contrast(self, first: Tensor, second: Tensor, temperature: float | Tensor, batch: Batch) -> Tensor:
        """The decoupled InfoNCE."""
        return two_view_info_nce(
            first, second, temperature, batch.index, domain=self.domain_of(batch),
            other_domain=self.temperature.config.other_domain, decoupled=True,
        )  # fmt: skip
