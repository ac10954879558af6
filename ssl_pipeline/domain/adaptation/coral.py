"""CORAL: the same covariance of the features in source and target."""

from __future__ import annotations

from torch import Tensor

from ssl_pipeline.domain.losses import coral_loss
from ssl_pipeline.domain.method import JointConfig
from ssl_pipeline.engine.task import Embeddings


class Config(JointConfig):
    """Deep CORAL (Sun and Saenko 2016): see :func:`ssl_pipeline.domain.losses.coral_loss`."""

    def term(self, source: Embeddings, target: Embeddings) -> Tensor:
        return coral_loss(source["features"], target["features"])
