"""Information maximization beside the source: each target prediction certain, all of them together diverse."""

from __future__ import annotations

from torch import Tensor

from ssl_pipeline.domain.losses import information_maximization
from ssl_pipeline.domain.method import JointConfig
from ssl_pipeline.engine.task import Embeddings


class Config(JointConfig):
    """SHOT-IM's loss (Liang et al. 2020) in one training with the source; without the source it is ``shot_im``."""

    def term(self, source: Embeddings, target: Embeddings) -> Tensor:
        return information_maximization(target["logits"])
