"""Weight averaging: the mean of the weights after every step, with statistics of its own."""

from __future__ import annotations

from typing import ClassVar

import torch

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.domain.method import GeneralizationConfig, SourceTask
from ssl_pipeline.domain.statistics import estimate_statistics
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.models.teacher import EMAModel
from ssl_pipeline.schedules import Duration, DurationValue, parse_duration
from ssl_pipeline.transforms.preprocessing import Preprocessing


class Config(GeneralizationConfig):
    r"""The simple moving average of all weights (Arpit et al. 2022).

    With :math:`\theta_t` the weights after step t of T it is

    .. math:: \bar\theta = \frac{1}{T - t_0} \sum_{t = t_0 + 1}^{T} \theta_t

    BatchNorm's statistics are estimated for it at the end.

    Attributes:
        start: t₀, how much of the training comes before the average; at most half of it is left out, however short it is.
    """

    selects: ClassVar[bool] = False  # the average is of many steps
    start: Duration = parse_duration("100 steps")

    def build(self, classifier: Classification, target: IndexedDataset) -> WeightAveraging:
        """The task around a classifier."""
        del target
        return WeightAveraging(classifier, self.start)


class WeightAveraging(SourceTask):
    """See :class:`Config`."""

    def __init__(self, classifier: Classification, start: DurationValue) -> None:
        super().__init__(classifier)
        self.start = start
        self.average = EMAModel(classifier)

    def after_step(self, batch: Batch) -> None:
        """The average takes the weights in; until its start it is the weights themselves."""
        clock = batch.clock
        before = max(0, clock.step - min(self.start.on(clock), clock.total // 2))  # steps that are in it
        self.average.follow(self.classifier, before / (before + 1))

    @torch.no_grad()
    def finish(
        self, labeled: IndexedDataset, target: IndexedDataset, preprocessing: Preprocessing, share: DistInfo
    ) -> None:
        """The classifier gets the average, and statistics that fit it."""
        del target
        for kept, averaged in zip(self.classifier.parameters(), self.average.network.parameters(), strict=True):
            kept.copy_(averaged)
        estimate_statistics(self.classifier, self.classifier.predict, labeled, preprocessing, share)
