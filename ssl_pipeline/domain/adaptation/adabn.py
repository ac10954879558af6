"""AdaBN: after training on the source, BatchNorm's statistics become the target's."""

from __future__ import annotations

from typing import ClassVar

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.domain.method import MethodConfig, Phase, SourceTask, update_bn
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.regime import TrainContext
from ssl_pipeline.models.batch_norm import batch_norms


class Config(MethodConfig):
    """Adaptive batch normalization (Li et al. 2017). The source's own figures are those of the target's statistics, too."""

    phases: ClassVar[tuple[Phase, ...]] = ("source",)
    supports_frozen: ClassVar[bool] = True
    keeps_statistics: ClassVar[bool] = False

    def build(self, classifier: Classification, target: IndexedDataset) -> AdaBN:
        if not batch_norms(classifier):
            raise ConfigError(
                "`domain=adabn` adapts BatchNorm's statistics, and this network has none: take another method."
            )
        return AdaBN(self, classifier)


class AdaBN(SourceTask):
    """See :class:`Config`."""

    def finish(self, target: IndexedDataset, context: TrainContext) -> None:
        update_bn(self.classifier, self.classifier.predict, target, context.preprocessing, context.share)
