"""Weight averaging: the moving average of the weights, with statistics of its own."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.loader import Preprocessing, Share
from ssl_pipeline.data.source import Indexed
from ssl_pipeline.domain.method import GeneralizationConfig, SourceTask
from ssl_pipeline.domain.statistics import estimate_statistics
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.model.teacher import Teacher


class Config(GeneralizationConfig):
    """An exponential moving average of all weights (Arpit et al. 2022); BatchNorm's statistics are estimated for it at the end.

    Attributes:
        momentum: what is kept of the average at each step.
    """

    selects: ClassVar[bool] = False  # the average is of all steps
    momentum: float = Field(0.99, ge=0, lt=1)

    def build(self, classifier: Classification, target: Indexed) -> WeightAveraging:
        """The task around a classifier."""
        del target
        return WeightAveraging(classifier, self.momentum)


class WeightAveraging(SourceTask):
    """See :class:`Config`."""

    def __init__(self, classifier: Classification, momentum: float) -> None:
        super().__init__(classifier)
        self.momentum = momentum
        self.average = Teacher(classifier)

    def after_step(self, batch: Batch) -> None:
        """The average follows, from the start no slower than a plain mean over the steps."""
        step = batch.clock.step
        self.average.follow(self.classifier, min(self.momentum, step / (step + 1)))

    @torch.no_grad()
    def finish(self, labelled: Indexed, target: Indexed, preprocessing: Preprocessing, share: Share) -> None:
        """The classifier gets the average, and statistics that fit it."""
        del target
        for kept, averaged in zip(self.classifier.parameters(), self.average.network.parameters(), strict=True):
            kept.copy_(averaged)
        estimate_statistics(self.classifier, self.classifier.predict, labelled, preprocessing, share)
