"""Weight averaging: the mean of the weights after every step, with statistics of its own."""

from __future__ import annotations

from typing import ClassVar

import torch

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.domain.method import GeneralizationConfig, SourceTask, update_bn
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.regime import TrainContext
from ssl_pipeline.models.ema import EMAModel
from ssl_pipeline.schedules import Duration, parse_duration


class WeightAveraging(SourceTask):
    """See :class:`Config`."""

    config: Config

    def __init__(self, config: Config, classifier: Classification) -> None:
        super().__init__(config, classifier)
        self.average = EMAModel(classifier)

    def after_step(self, batch: Batch) -> None:
        """The average takes the weights in; until its start it is the weights themselves."""
        clock = batch.clock
        before = max(0, clock.step - min(self.config.start.on(clock), clock.total // 2))  # steps that are in it
        self.average.follow(self.classifier, before / (before + 1))

    @torch.no_grad()
    def finish(self, target: IndexedDataset, context: TrainContext) -> None:
        for kept, averaged in zip(self.classifier.parameters(), self.average.network.parameters(), strict=True):
            kept.copy_(averaged)
        update_bn(self.classifier, self.classifier.predict, context.labeled.train, context.preprocessing, context.share)


class Config(GeneralizationConfig):
    r"""The simple moving average of all weights (Arpit et al. 2022).

    With :math:`\theta_t` the weights after step t of T it is

    .. math:: \bar\theta = \frac{1}{T - t_0} \sum_{t = t_0 + 1}^{T} \theta_t

    BatchNorm's statistics are estimated for it at the end.

    Attributes:
        start: t₀, how much of the training comes before the average; at most half of it is left out, however short it is.
    """

    task = WeightAveraging
    selects: ClassVar[bool] = False  # the average is of many steps
    start: Duration = parse_duration("100 steps")
