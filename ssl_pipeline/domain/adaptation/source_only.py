"""Source-only: no target image is used. What every adaptation is compared with."""

from __future__ import annotations

from typing import ClassVar

from ssl_pipeline.domain.method import MethodConfig, Phase, SourceTask


class Config(MethodConfig):
    """Cross-entropy on the source."""

    task = SourceTask
    phases: ClassVar[tuple[Phase, ...]] = ("source",)
    supports_frozen: ClassVar[bool] = True
