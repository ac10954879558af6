"""The parts of a JSON file of COCO's form, checked: ids, names and annotations that other tools write in other ways."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_pipeline.config.base import ConfigError, joined
from ssl_pipeline.data.bad_files import BadFilesLimit
from ssl_pipeline.data.masks import report_bad_masks

Categories = tuple[tuple[int, str], ...]  # numbers, which may have gaps, and names; their order is that of the classes
_CROWD: dict[Any, int] = {None: 0, 0: 0, 1: 1, "0": 0, "1": 1}
_log = logging.getLogger("ssl_pipeline")


def categories_of(rows: Sequence[dict[str, Any]], path: Path) -> Categories:
    """The classes, in the order of their numbers.

    Raises:
        ConfigError: an id is no whole number, or an id or a name stands there twice: boxes would go to the wrong class.
    """
    wrong = [f"{row['name']!r} has the id {row['id']!r}" for row in rows if not _is_whole(row["id"])]
    if wrong:
        raise ConfigError(f"{path}: ids of `categories` must be whole numbers, and {joined(wrong)}: number them.")
    for key in ("id", "name"):
        twice = [value for value, count in Counter(str(row[key]).strip() for row in rows).items() if count > 1]
        if twice:
            raise ConfigError(
                f"{path}: two entries of `categories` have the {key} {twice[0]!r} ({len(twice)} such): give each one of its own, or "
                "join them."
            )
    return tuple(sorted((row["id"], str(row["name"]).strip()) for row in rows))


def check_images(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Refuses images that can't be told apart, and sizes that are no numbers.

    Raises:
        ConfigError: naming them.
    """
    problems = [
        f"{path}: image {row['file_name']!r} has the id {row['id']!r}, and a number or a text was expected."
        for row in rows
        if isinstance(row["id"], bool) or not isinstance(row["id"], int | str)
    ]
    problems += [
        f"{path}: image {row['file_name']!r} has the {key} {row[key]!r}, and a whole number was expected."
        for row in rows
        for key in ("width", "height")
        if row.get(key) is not None
        and not (isinstance(row[key], float) and row[key].is_integer())
        and not _is_whole(row[key])
    ]
    report_bad_masks(problems)
    for key, mend in (
        ("id", "number them anew"),
        ("file_name", "join their entries, or a test image may be trained on"),
    ):
        twice = [value for value, count in Counter(row[key] for row in rows).items() if count > 1]
        if twice:
            raise ConfigError(
                f"{path}: image {key} {twice[0]} stands there more than once ({len(twice)} such): {mend}."
            )


def plain_annotations(rows: Sequence[dict[str, Any]], path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The annotations whose ids can be looked up, ``iscrowd`` as 0 or 1; and of the others what is wrong."""
    sound, problems = [], []
    for place, row in enumerate(rows):
        what = f"{path}: annotation {row.get('id', f'at place {place}')}"
        crowd = row.get("iscrowd")
        ids = [key for key in ("image_id", "category_id") if not isinstance(row[key], int | str)]
        if ids:
            problems.append(f"{what} has the {ids[0]} {row[ids[0]]!r}, and a number was expected.")
        elif not isinstance(crowd, int | float | str | None) or crowd not in _CROWD:
            problems.append(f"{what} has `iscrowd` {crowd!r}, and 0 or 1 was expected.")
        else:
            sound.append({**row, "iscrowd": _CROWD[crowd]})
    return sound, problems


def leave_out(problems: Sequence[str], count: int, limit: BadFilesLimit, path: Path) -> None:
    """Says which annotations are left out, or stops if they are too many.

    Args:
        problems: a sentence for each.
        count: of how many annotations.
        limit: how many may be.
        path: of the file.

    Raises:
        ConfigError: they are more, with the first of them.
    """
    allowed = limit.of(count)
    if len(problems) > allowed:
        more = [f"… and {len(problems) - 10} more"] if len(problems) > 10 else []
        end = (
            f"{len(problems)} of {count} annotations in {path} can't be used, and `data.bad_files={limit}` allows {allowed}: "
            "mend them, or raise the limit to leave them out."
        )
        raise ConfigError([*problems[:10], *more, end])
    if problems:
        _log.warning("left out %d of %d annotations, such as: %s", len(problems), count, problems[0])


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
