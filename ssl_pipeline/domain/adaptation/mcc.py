"""MCC: target predictions that confuse few pairs of classes."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.domain.losses import class_confusion
from ssl_pipeline.domain.method import JointConfig, JointTask
from ssl_pipeline.engine.task import Embeddings


class MCC(JointTask):
    """See :class:`Config`."""

    config: Config

    def term(self, source: Embeddings, target: Embeddings, batch: Batch) -> Tensor:
        return class_confusion(target["logits"], self.config.temperature)


class Config(JointConfig):
    """Minimum class confusion (Jin et al. 2020).

    Attributes:
        temperature: of the predictions in this loss.
    """

    task = MCC
    temperature: float = Field(2.5, gt=0)
