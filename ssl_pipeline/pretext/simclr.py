"""SimCLR: two views of an image attract each other, and repel the views of all other images in the batch.

    ℓ(i) = −log( exp(zᵢ·zₚ ÷ τ) ÷ Σ_{j≠i} exp(zᵢ·zⱼ ÷ τ) )

over all 2B rows z of the batch, on the unit sphere, where p is the other view of i's image; the loss is the mean over
i.

When to use: the one to start with. Its negatives are the batch's, so it wants large batches (``batch.micro`` makes
room) and a temperature that fits them. Chen et al. 2020, arXiv 2002.05709, equation 1.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ImageDataset
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.losses.info_nce import two_view_info_nce
from ssl_pipeline.losses.temperature import temperature_figures
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.pretext._projected import Contrastive, ContrastiveConfig, forward_views


class Config(ContrastiveConfig):
    """SimCLR (Chen et al. 2020)."""

    def build(self, encoder: Encoder, source: ImageDataset) -> SimCLR:
        """The task around an encoder."""
        self.check_domains(source.has_domains)
        return SimCLR(self, encoder)


class SimCLR(Contrastive):
    """See :class:`Config`. DCL and SupCon change the loss alone."""

    def embed(self, batch: Batch) -> Embeddings:
        """Both views go through the network as one batch, so that BatchNorm sees both."""
        first, second = forward_views(self.project, batch.views)
        return {"first": first, "second": second}

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        """The loss over all processes' rows, and what the temperature does to it."""
        first, second, temperature = embeddings["first"], embeddings["second"], self.temperature(batch.clock)
        loss = self.contrast(first, second, temperature, batch)
        rows, place = torch.cat([first, second]).detach(), torch.arange(2 * len(first), device=first.device)
        pairs = place % len(first)
        details = partial(temperature_figures, rows, rows, (pairs, pairs), temperature, own=(place, place))
        return StepOutput(loss, {"temperature": temperature}, details)

    def contrast(self, first: Tensor, second: Tensor, temperature: float | Tensor, batch: Batch) -> Tensor:
        """InfoNCE; an image that comes twice, for a damaged neighbor, is no negative of itself."""
        return two_view_info_nce(
            first,
            second,
            temperature,
            batch.index,
            domain=self.domain_of(batch),
            other_domain=self.temperature.config.other_domain,
        )

    def domain_of(self, batch: Batch) -> Tensor | None:
        """The samples' domains, if the temperature asks for them."""
        return batch.domain if self.temperature.config.other_domain is not None else None

    def after_step(self, batch: Batch) -> None:
        """A learned temperature keeps within its bounds."""
        del batch
        self.temperature.clamp()
