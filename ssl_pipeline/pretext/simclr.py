"""SimCLR: two views of an image attract each other, and repel the views of all other images in the batch.

    ℓ(i) = −log( exp(zᵢ·zₚ ÷ τ) ÷ Σ_{j≠i} exp(zᵢ·zⱼ ÷ τ) )

over all 2B rows z of the batch, on the unit sphere, where p is the other view of i's image; the loss is the mean over
i.

When to use: the one to start with. Its negatives are the batch's, so it needs large batches (``micro_batch_size`` makes
room) and a temperature that fits them. Chen et al. 2020, arXiv 2002.05709, equation 1.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.losses.info_nce import two_view_info_nce
from ssl_pipeline.losses.temperature import temperature_metrics
from ssl_pipeline.pretext._base import ContrastiveConfig, ProjectionTask


class SimCLR(ProjectionTask):
    """See :class:`Config`; the base of DCL, DCLW and SupCon."""

    config: Config

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        first, second = embeddings.values()
        temperature = self.temperature(batch.clock)
        loss = self.contrast(first, second, temperature, batch)
        rows, place = torch.cat([first, second]).detach(), torch.arange(2 * len(first), device=first.device)
        pairs = place % len(first)
        details = partial(temperature_metrics, rows, rows, (pairs, pairs), temperature, own=(place, place))
        return StepOutput(loss, {"temperature": temperature}, details)

    def contrast(self, first: Tensor, second: Tensor, temperature: float | Tensor, batch: Batch) -> Tensor:
        """InfoNCE of both views over the rows of all processes."""
        other_domain = self.temperature.config.other_domain
        return two_view_info_nce(
            first, second, temperature, self.positives(batch), domain=None if other_domain is None else batch.domain,
            other_domain=other_domain, decoupled=self.config.decoupled,
        )  # fmt: skip

    def positives(self, batch: Batch) -> Tensor:
        """Ids, int64 of shape (B,): rows of equal ids are positives. An image that comes twice is no negative of itself."""
        return batch.index

    def after_step(self, batch: Batch) -> None:
        self.temperature.clamp()


class Config(ContrastiveConfig):
    """SimCLR (Chen et al. 2020)."""

    task = SimCLR
    decoupled: ClassVar[bool] = False  # whether the positive is left out of the denominator
