"""MMD: the same mean of the features in source and target, in the space of several Gaussian kernels."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.domain.alignment import mmd_loss
from ssl_pipeline.domain.method import JointConfig, JointTask
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.engine.task import Embeddings


class Config(JointConfig):
    """Maximum mean discrepancy on the features (Gretton et al. 2012; Long et al. 2015).

    Attributes:
        bandwidths: of the kernels, as multiples of the batch's mean squared distance.
    """

    bandwidths: tuple[float, ...] = Field((0.25, 0.5, 1.0, 2.0, 4.0), min_length=1)

    def build(self, classifier: Classification, target: IndexedDataset) -> MMD:
        """The task around a classifier."""
        del target
        return MMD(self, classifier)


class MMD(JointTask):
    """See :class:`Config`."""

    def __init__(self, config: Config, classifier: Classification) -> None:
        super().__init__(config, classifier)
        self.bandwidths = config.bandwidths

    def term(self, source: Embeddings, target: Embeddings, batch: Batch) -> Tensor:
        """On the features."""
        del batch
        return mmd_loss(source["features"], target["features"], self.bandwidths)
