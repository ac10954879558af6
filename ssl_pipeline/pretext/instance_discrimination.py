"""Instance discrimination with an exemplar memory: which of all N images is this?

    p(i | x) = exp(Kᵢ·f(x) ÷ τ) ÷ Σ_{j=1…N} exp(Kⱼ·f(x) ÷ τ),   ℓ = −log p(i | xᵢ),   Kᵢ ← normalize(m Kᵢ + (1 − m) f(xᵢ))

with one memory row K an image; the softmax is the full one, without sampling.

When to use: one view an image is enough, and up to some hundred thousand images (N rows of ``projection_width``). Wu
et al. 2018, arXiv 1805.01978, equation 2; the rising m is Zhong et al. 2019, arXiv 1904.01990.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ImageDataset, IndexedDataset
from ssl_pipeline.engine.task import Embeddings, StepOutput, Task
from ssl_pipeline.losses.info_nce import info_nce
from ssl_pipeline.losses.memory_bank import MemoryBank
from ssl_pipeline.losses.temperature import temperature_metrics
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.pretext._base import ContrastiveConfig, ProjectionTask


class InstanceDiscrimination(ProjectionTask):
    """See :class:`Config`. The projection is the paper's one linear layer by default."""

    config: Config

    def __init__(self, config: Config, encoder: Encoder, samples: int) -> None:
        super().__init__(config, encoder)
        self.bank = MemoryBank(samples, config.projection_width)
        self._seen: Tensor | None = None

    def prime(self, extract: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> None:
        self.bank.fill(extract(self.project))

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        temperature = self.temperature(batch.clock)
        match = batch.index, torch.arange(len(self.bank.rows), device=batch.index.device)
        views = list(embeddings.values())
        losses = [info_nce(rows, self.bank.rows, match, temperature) for rows in views]
        self._seen = torch.stack([rows.detach() for rows in views]).mean(0)
        details = partial(temperature_metrics, views[0].detach(), self.bank.rows, match, temperature)
        return StepOutput(torch.stack(losses).mean(), {"temperature": temperature}, details)

    def after_step(self, batch: Batch) -> None:
        self.temperature.clamp()
        assert self._seen is not None
        start, end = self.config.memory_momentum, self.config.memory_momentum_end
        self.bank.update(batch.index, self._seen, start + (end - start) * batch.clock.step / batch.clock.total)
        self._seen = None


class Config(ContrastiveConfig):
    """Non-parametric instance discrimination (Wu et al. 2018), with the full softmax over the memory.

    Attributes:
        memory_momentum: what is kept of a memory row when its image is seen again, at the start of training.
        memory_momentum_end: the same at the end; rises linearly (Zhong et al. 2019 let it rise with the epochs).
    """

    contrasts_with = "a memory without domains"
    views_needed: ClassVar[int | None] = None
    layers: int = Field(1, ge=1)
    memory_momentum: float = Field(0.5, ge=0, lt=1)
    memory_momentum_end: float = Field(0.5, ge=0, le=1)

    def build(self, encoder: Encoder, source: ImageDataset) -> Task:
        if not isinstance(source, IndexedDataset):
            raise ConfigError(
                f"`pretext=instance_discrimination` keeps a row for each image, and {source.name} is read from front to back: take "
                "numbered images (a folder, a table), or a task with a queue, such as moco_v2."
            )
        self.check_domains(source.has_domains)
        return InstanceDiscrimination(self, encoder, len(source))
