"""Which network is the backbone."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torchvision import models
from torchvision.models import list_models

from ssl_pipeline.config.base import FrozenModel


class BackboneConfig(FrozenModel):
    """Which network extracts the features.

    Attributes:
        name: ``small_resnet``, a torchvision name (``resnet50``, ``vit_b_16``, …), or timm's: ``timm/NAME``, or ``NAME``
            where torchvision has none of that name.
        weights: an official enum name (``IMAGENET1K_V2``; ``DEFAULT``), for timm a pretrained tag or ``DEFAULT``, or a
            file.
        weights_key: which network of a file that holds several, such as ``teacher`` or ``encoder_k``.
        stem: ``small``: 3×3 with stride 1 for small images. ``auto``: that for images up to 64 px, where the family has
            one and no weights are given. ``imagenet``: as published; for small_resnet 3×3 with stride 2.
        width: of small_resnet's first stage.
    """

    name: str = "small_resnet"
    weights: str | None = None
    weights_key: str | None = None
    stem: Literal["auto", "imagenet", "small"] = "auto"
    width: int = Field(16, ge=1)

    @property
    def is_timm(self) -> bool:
        return self.name.startswith("timm/") or self.name not in {"small_resnet", *torchvision_names()}


def torchvision_names() -> list[str]:
    """Torchvision's image classifiers; its detectors would download weights when they are built."""
    names: list[str] = list_models(module=models)
    return names
