"""ERM: cross-entropy on all sources as one."""

from __future__ import annotations

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.domain.method import GeneralizationConfig, SourceTask
from ssl_pipeline.downstream.classification import Classification


class Config(GeneralizationConfig):
    """Empirical risk minimization: what domain generalization is compared with (Gulrajani and Lopez-Paz 2021)."""

    def build(self, classifier: Classification, target: IndexedDataset) -> SourceTask:
        """The task around a classifier."""
        del target
        return SourceTask(classifier)
