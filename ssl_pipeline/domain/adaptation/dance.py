"""DANCE: target images near a class or near one another, and certain or else surely unknown."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.domain.losses import entropy
from ssl_pipeline.domain.method import JointConfig, MemoryTask
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.engine.task import Embeddings
from ssl_pipeline.losses.info_nce import normalize_rows
from ssl_pipeline.schedules import TrainProgress

_NO_NEIGHBOR = -1e4  # a logit of no weight; an infinite one has no gradient


class Config(JointConfig):
    r"""Neighborhood clustering and entropy separation (Saito et al. 2020), for targets with classes of their own.

    The first is the entropy of a target row's similarities to the other rows of a memory and to the classes' weights, which the
    cosine head learns as prototypes on the unit sphere: a linear head's weights are far from every row. The second, with :math:`\rho = \frac{1}{2} \log K`, is :math:`-|H(p) - \rho|` where that exceeds the margin.

    Attributes:
        weight: of both terms.
        temperature: of the similarities.
        margin: entropies nearer to ρ than this are left alone.
    """

    head: ClassVar[str | None] = "cosine"
    weight: float = Field(0.05, ge=0)
    temperature: float = Field(0.05, gt=0)
    margin: float = Field(0.5, ge=0)

    def build(self, classifier: Classification, target: IndexedDataset) -> DANCE:
        return DANCE(self, classifier, len(target))


def neighborhood_entropy(rows: Tensor, bank: Tensor, index: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """The mean entropy of similarities of rows (B, D) to other unit rows of the bank (N, D) and to prototypes (K, D).

    ``index`` says which row of the bank each is (Saito et al. 2020, eq. 3).
    """
    rows = normalize_rows(rows)
    to_bank = (rows @ bank.T / temperature).scatter(1, index[:, None], _NO_NEIGHBOR)
    return entropy(torch.cat([to_bank, rows @ normalize_rows(prototypes).T / temperature], 1)).mean()


def entropy_separation(logits: Tensor, margin: float) -> Tensor:
    """Pushes entropies away from half of the greatest one (Saito et al. 2020, eq. 5)."""
    distance = (entropy(logits) - math.log(logits.shape[1]) / 2).abs()
    return -torch.where(distance > margin, distance, 0).mean()


class DANCE(MemoryTask):
    """See :class:`Config`."""

    config: Config

    def memory_term(self, target: Embeddings, index: Tensor, clock: TrainProgress) -> Tensor:
        prototypes = self.classifier.head.weight
        assert isinstance(prototypes, Tensor)
        near = neighborhood_entropy(target["features"], self.bank.rows, index, prototypes, self.config.temperature)
        return near + entropy_separation(target["logits"], self.config.margin)
