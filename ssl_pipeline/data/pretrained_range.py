"""The scale of images of more than 8 bits, handed over with an encoder: what was white for it must stay white."""

from __future__ import annotations

import json
from pathlib import Path

from ssl_pipeline.data.source import DecodedConfig, SourceConfig


def at_range_of(data: SourceConfig, path: str | None) -> SourceConfig:
    """The data at the range that an encoder or model was trained at, where the user gives none.

    Args:
        data: the configuration of a source.
        path: a run's folder or a file in it; None, and what is no run of ours, changes nothing.
    """
    if path is None or not isinstance(data, DecodedConfig) or data.range != "auto":
        return data
    place = Path(path).expanduser()
    try:
        card = json.loads(((place if place.is_dir() else place.parent) / "card.json").read_text(encoding="utf-8"))
        found = card["blueprint"].get("range")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # told where the encoder is opened
        return data
    return data if found is None else data.model_copy(update={"range": (float(found[0]), float(found[1]))})
