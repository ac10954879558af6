"""CORAL: the same covariance of the features in source and target."""

from __future__ import annotations

from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.domain.alignment import coral_loss
from ssl_pipeline.domain.method import JointConfig, JointTask
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.engine.task import Embeddings


class Config(JointConfig):
    """Deep CORAL (Sun and Saenko 2016): see :func:`ssl_pipeline.domain.alignment.coral_loss`."""

    def build(self, classifier: Classification, target: IndexedDataset) -> CORAL:
        """The task around a classifier."""
        del target
        return CORAL(self, classifier)


class CORAL(JointTask):
    """See :class:`Config`."""

    def term(self, source: Embeddings, target: Embeddings, batch: Batch) -> Tensor:
        """On the features."""
        del batch
        return coral_loss(source["features"], target["features"])
