"""Source-only: the target is not looked at. What every adaptation is compared with."""

from __future__ import annotations

from typing import ClassVar

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.domain.method import MethodConfig, Phase, SourceTask
from ssl_pipeline.downstream.classification import Classification


class Config(MethodConfig):
    """Cross-entropy on the source."""

    phases: ClassVar[tuple[Phase, ...]] = ("source",)
    fits_bare_encoder: ClassVar[bool] = True

    def build(self, classifier: Classification, target: IndexedDataset) -> SourceTask:
        """The task around a classifier."""
        del target
        return SourceTask(classifier)
