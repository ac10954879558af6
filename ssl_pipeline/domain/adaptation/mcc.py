"""MCC: target predictions that confuse few pairs of classes."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.domain.certainty import class_confusion
from ssl_pipeline.domain.method import JointConfig, JointTask
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.engine.task import Embeddings


class Config(JointConfig):
    """Minimum class confusion (Jin et al. 2020).

    Attributes:
        temperature: of the predictions in this loss.
    """

    temperature: float = Field(2.5, gt=0)

    def build(self, classifier: Classification, target: IndexedDataset) -> MCC:
        """The task around a classifier."""
        del target
        return MCC(self, classifier)


class MCC(JointTask):
    """See :class:`Config`."""

    def __init__(self, config: Config, classifier: Classification) -> None:
        super().__init__(config, classifier)
        self.temperature = config.temperature

    def term(self, source: Embeddings, target: Embeddings, batch: Batch) -> Tensor:
        """On the target's logits."""
        del source, batch
        return class_confusion(target["logits"], self.temperature)
