"""MoCo v3: a predictor on the encoder, a slowly moving teacher, and the batch itself as negatives.

    ℓ(q) = −2τ log( exp(q·k₊ ÷ τ) ÷ Σ_{k in the other views} exp(q·k ÷ τ) ),   summed over both ways

When to use: vision transformers and large batches. Chen, Xie and He 2021, arXiv 2104.02057, equation 1 and algorithm
1.
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.engine.task import Embeddings, StepOutput
from ssl_pipeline.losses.gather import all_gather_ids, all_gather_rows
from ssl_pipeline.losses.info_nce import Match, info_nce
from ssl_pipeline.losses.temperature import temperature_metrics
from ssl_pipeline.models.ema import EMAModel, EMAMomentumConfig
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.projection_heads import prediction_head
from ssl_pipeline.pretext._base import ContrastiveConfig, ProjectionTask, forward_views


class MoCoV3(ProjectionTask):
    """See :class:`Config`. The loss is scaled by 2τ, as in the paper, through which no gradient reaches a learned τ."""

    config: Config

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(config, encoder, final_norm=True)
        self.predictor = prediction_head(config.projection_width, config.predictor_width)
        self.teacher = EMAModel(self.student())

    def embed(self, batch: Batch) -> Embeddings:
        queries = forward_views(lambda images: self.predictor(self.project(images)), batch.views)
        keys = forward_views(self.teacher, batch.views)
        return {"query 0": queries[0], "query 1": queries[1], "key 0": keys[0], "key 1": keys[1]}

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        temperature = self.temperature(batch.clock)
        match: Match = (batch.index, all_gather_ids(batch.index))
        other_domain = self.temperature.config.other_domain
        domain = None
        if other_domain is not None and batch.domain is not None:
            domain = batch.domain, all_gather_ids(batch.domain)
        losses, keys = [], [all_gather_rows(embeddings[f"key {i}"].detach()) for i in (0, 1)]
        for i in (0, 1):
            query = embeddings[f"query {i}"]
            losses.append(info_nce(query, keys[1 - i], match, temperature, domain=domain, other_domain=other_domain))
        # The factor keeps the gradient's size over temperatures. A learned one must not lower the loss through it.
        scale = 2 * (temperature.detach() if isinstance(temperature, Tensor) else temperature)
        details = partial(temperature_metrics, embeddings["query 0"].detach(), keys[1], match, temperature)
        return StepOutput(scale * torch.stack(losses).sum(), {"temperature": temperature}, details)

    def after_step(self, batch: Batch) -> None:
        self.temperature.clamp()
        self.teacher.follow(self.student(), self.config.momentum.at(batch.clock))


class Config(ContrastiveConfig):
    """MoCo v3 (Chen, Xie and He 2021).

    Attributes:
        momentum: of the teacher.
        predictor_width: between the predictor's two layers.
    """

    task = MoCoV3
    momentum: EMAMomentumConfig = EMAMomentumConfig(start=0.99)
    predictor_width: int = Field(2048, ge=1)
