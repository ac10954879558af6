"""ERM: cross-entropy on all sources as one."""

from __future__ import annotations

from ssl_pipeline.domain.method import GeneralizationConfig


class Config(GeneralizationConfig):
    """Empirical risk minimization: what domain generalization is compared with (Gulrajani and Lopez-Paz 2021)."""
