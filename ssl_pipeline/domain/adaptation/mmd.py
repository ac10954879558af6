"""MMD: the same mean of the features in source and target, in the space of several Gaussian kernels."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from ssl_pipeline.domain.losses import mmd_loss
from ssl_pipeline.domain.method import JointConfig
from ssl_pipeline.engine.task import Embeddings


class Config(JointConfig):
    """Maximum mean discrepancy on the features (Gretton et al. 2012; Long et al. 2015).

    Attributes:
        bandwidths: of the kernels, as multiples of the batch's mean squared distance.
    """

    bandwidths: tuple[float, ...] = Field((0.25, 0.5, 1.0, 2.0, 4.0), min_length=1)

    def term(self, source: Embeddings, target: Embeddings) -> Tensor:
        return mmd_loss(source["features"], target["features"], self.bandwidths)
