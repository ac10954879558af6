"""ECN's exemplar memory: a target image is like itself, its neighbors, and itself in the source's style."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.domain.method import JointConfig, MemoryTask
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.engine.task import Embeddings
from ssl_pipeline.losses.info_nce import normalize_rows
from ssl_pipeline.schedules import TrainProgress
from ssl_pipeline.transforms.augment import amplitude_mix


class Config(JointConfig):
    r"""Exemplar, neighborhood and style invariance by a memory :math:`K` of the target's rows (Zhong et al. 2019).

    .. math:: L = -\frac{1}{B} \sum_i \sum_j w_{ij} \log
        \frac{\exp(K_j^\top f_i / \beta)}{\sum_{k=1}^{N} \exp(K_k^\top f_i / \beta)}

    with :math:`w_{ii} = 1` and :math:`w_{ij} = 1/k` for its k nearest rows. Where the paper has an image restyled by a
    generator, here its Fourier amplitude moves towards a source image's (Yang and Soatto 2020; Xu et al. 2021).

    Attributes:
        weight: of the memory's loss.
        temperature: β.
        neighbors: k.
        neighbors_from: the share of the training after which neighbors count: before, they are of no class.
        restyled: how often a target image comes in a source image's style.
        memory_momentum_end: what is kept of a memory row at the end of training; rises linearly from 0.
    """

    weight: float = Field(0.3, ge=0)
    temperature: float = Field(0.05, gt=0)
    neighbors: int = Field(6, ge=1)
    neighbors_from: float = Field(0.1, ge=0, le=1)
    restyled: float = Field(0.5, ge=0, le=1)
    memory_momentum_end: float = Field(0.6, ge=0, lt=1)

    def build(self, classifier: Classification, target: IndexedDataset) -> ExemplarMemory:
        return ExemplarMemory(self, classifier, len(target))


def memory_loss(rows: Tensor, bank: Tensor, index: Tensor, temperature: float, neighbors: int) -> Tensor:
    """See :class:`Config`: rows (B, D), the bank's unit rows (N, D), the row of each, and k, which 0 leaves out."""
    similarity = normalize_rows(rows) @ bank.T
    log_share = (similarity / temperature).log_softmax(1)
    loss = -log_share.gather(1, index[:, None])[:, 0]
    count = min(neighbors, len(bank) - 1)
    if count:
        others = similarity.detach().scatter(1, index[:, None], -torch.inf)
        loss = loss - log_share.gather(1, others.topk(count, dim=1).indices).mean(1)
    return loss.mean()


class ExemplarMemory(MemoryTask):
    """See :class:`Config`."""

    config: Config

    def embed(self, batch: Batch) -> Embeddings:
        """Some of the target's images take the style of the source's, in place of themselves: it costs no forward."""
        source, target = batch.views[0].chunk(2)
        # torch's generator: the loop has reseeded it by the step's name.
        chosen = torch.rand(len(target), device=target.device) < self.config.restyled
        strength = torch.rand(len(target), device=target.device) * chosen
        views = [torch.cat([source, amplitude_mix(target, source, strength)])]
        return super().embed(Batch(batch.clock, batch.index, views, batch.label, batch.domain))

    def memory_term(self, target: Embeddings, index: Tensor, clock: TrainProgress) -> Tensor:
        config = self.config
        count = config.neighbors if clock.step >= config.neighbors_from * clock.total else 0
        return memory_loss(target["features"], self.bank.rows, index, config.temperature, count)

    def momentum(self, clock: TrainProgress) -> float:
        return self.config.memory_momentum_end * clock.step / clock.total
