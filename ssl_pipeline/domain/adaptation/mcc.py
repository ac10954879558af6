"""MCC: target predictions that confuse few pairs of classes."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from ssl_pipeline.domain.losses import class_confusion
from ssl_pipeline.domain.method import JointConfig
from ssl_pipeline.engine.task import Embeddings


class Config(JointConfig):
    """Minimum class confusion (Jin et al. 2020).

    Attributes:
        temperature: of the predictions in this loss.
    """

    temperature: float = Field(2.5, gt=0)

    def term(self, source: Embeddings, target: Embeddings) -> Tensor:
        return class_confusion(target["logits"], self.temperature)
