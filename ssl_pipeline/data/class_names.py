"""Cells of a column of classes or domains: what is a name, what says that there is none, and what holds several."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ssl_pipeline.config.base import ConfigError, joined
from ssl_pipeline.data.bad_files import warn_once

_NONE = {"", "nan", "<na>", "na", "n/a", "#n/a", "none", "null", "-1", "-1.0"}
_INTEGRAL = re.compile(r"([+-]?\d+)(?:\.0*)?")


def class_name(value: Any) -> str | None:
    """A class's name without blanks around it; None where the cell says that there is none.

    What says so is the same in every kind of table: nothing, ``nan``, ``None``, ``N/A``, ``null`` (capitals aside) and −1, by which
    published test sets keep a label to themselves.
    """
    text = "" if value is None else str(value).strip()
    return None if text.casefold() in _NONE else text


def class_names(values: Sequence[Any], column: str, where: str) -> list[str | None]:
    """A column's names; ``1.0`` is ``1`` where all of them are whole numbers. What is taken for no name is said.

    Args:
        values: the cells.
        column: their column, for messages.
        where: the table, for messages.
    """
    names = [class_name(value) for value in values]
    lost = Counter(str(value) for value, name in zip(values, names, strict=True) if value is not None and name is None)
    if lost:
        told = joined([f"{text!r} ({count})" for text, count in lost.most_common()])
        warn_once(
            f"{where}: these values of {column!r} are read as no label: {told}. Rename the class if one is meant."
        )
    whole = {name: match[1] for name in set(names) if name is not None and (match := _INTEGRAL.fullmatch(name))}
    if any("." in name for name in whole) and len(whole) == len(set(names) - {None}):
        names = [None if name is None else whole[name] for name in names]
    _say_if_several(names, column, where)
    return names


def _say_if_several(names: Sequence[str | None], column: str, where: str) -> None:
    """A class ``cat|dog`` beside ``cat`` and ``dog`` is most likely two labels of an image."""
    known = {name for name in names if name is not None}
    for name in sorted(known):
        parts = [part.strip() for part in re.split(r"[|;,]", name)]
        if len(parts) > 1 and set(parts) & known:
            warn_once(
                f"{where}: {name!r} in {column!r} is read as one class; if it is several labels of an image, write a column of 0 "
                "and 1 for each and take `downstream=multi_label` with `data.target_columns=[…]`."
            )
            return


def refuse_several(value: Any, column: str, where: str) -> None:
    """Refuses a cell that holds a list or an object where one value is meant.

    Raises:
        ConfigError: it does.
    """
    if isinstance(value, list | tuple | dict | set):
        raise ConfigError(
            f"{where}: {column!r} holds {str(value)[:60]}, and one value was expected. For several labels of an image write a "
            "column of 0 and 1 for each, and take `downstream=multi_label` with `data.target_columns=[…]`."
        )
