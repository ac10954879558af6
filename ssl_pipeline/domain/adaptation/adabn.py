"""AdaBN: after training on the source, BatchNorm's statistics become the target's."""

from __future__ import annotations

from typing import ClassVar

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.domain.method import MethodConfig, Phase, SourceTask
from ssl_pipeline.domain.statistics import estimate_statistics
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.models.norms import batch_norms
from ssl_pipeline.transforms.preprocessing import Preprocessing


class Config(MethodConfig):
    """Adaptive batch normalization (Li et al. 2017). The source's own figures are those of the target's statistics, too."""

    phases: ClassVar[tuple[Phase, ...]] = ("source",)
    fits_bare_encoder: ClassVar[bool] = True
    keeps_statistics: ClassVar[bool] = False

    def build(self, classifier: Classification, target: IndexedDataset) -> AdaBN:
        """The task around a classifier.

        Raises:
            ConfigError: the network has no BatchNorm, so that nothing would happen.
        """
        del target
        if not batch_norms(classifier):
            raise ConfigError(
                "`domain=adabn` adapts BatchNorm's statistics, and this network has none: take another method."
            )
        return AdaBN(classifier)


class AdaBN(SourceTask):
    """See :class:`Config`."""

    def finish(
        self, labeled: IndexedDataset, target: IndexedDataset, preprocessing: Preprocessing, share: DistInfo
    ) -> None:
        """The target's statistics; of images without random views."""
        del labeled
        estimate_statistics(self.classifier, self.classifier.predict, target, preprocessing, share)
