"""Splits that are folders: which of them a folder holds, and what in it only looks like one."""

from __future__ import annotations

from pathlib import Path

from ssl_pipeline.data.source import Split
from ssl_pipeline.data.splits import resembles_split, splits_among
from ssl_pipeline.data.verdicts import listed, warn_once


def splits_in(root: Path) -> dict[Split, str]:
    """The names of the splits' folders directly in a folder; empty where it has none, or is not there.

    What lies beside them is not read, and what looks like a split without being one is not used as such: both are said.

    Raises:
        ConfigError: two folders mean the same split.
    """
    if not root.is_dir():
        return {}
    below = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    named = splits_among(below, repr(str(root)))
    others = [name for name in below if name not in named.values()]
    if named and others:
        warn_once(f"{root}: the splits are {listed(list(named.values()))}; not used: {listed(others)}.")
    elif alike := [name for name in others if resembles_split(name)]:
        warn_once(
            f"{root}: {listed(alike)} look like splits and are not used as such: splits are `train` with `val` or `test` "
            "beside it. Rename the folders if they are."
        )
    return named
