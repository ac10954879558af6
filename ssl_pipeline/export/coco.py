"""Boxes as COCO's results: under the numbers that a COCO json gives to images and categories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ssl_pipeline.config.base import ConfigError


class CocoNumbers:
    """The numbers that a COCO json gives to images (by the end of their paths) and categories (by name).

    Raises:
        ConfigError: it can't be read.
    """

    def __init__(self, annotations: Path) -> None:
        self._place = annotations
        try:
            known = json.loads(annotations.read_text(encoding="utf-8"))
            self._images = [(Path(one["file_name"]).parts, one["id"]) for one in known["images"]]
            self._categories = {one["name"]: one["id"] for one in known["categories"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--annotations: {str(annotations)!r} can't be read as COCO's json: {error}.") from error

    def image(self, file: Path) -> Any:
        """Of the image whose path shares the longest end with the file's.

        Raises:
            ConfigError: none does, or two as long a one.
        """
        ends = [(_shared_end(parts, file.parts), number) for parts, number in self._images]
        longest = max((length for length, _ in ends), default=0)
        found = [number for length, number in ends if length == longest]
        if longest == 0:
            raise ConfigError(f"--annotations: {str(self._place)!r} has no image {file.name!r}.")
        if len(found) > 1:
            raise ConfigError(
                f"--annotations: {str(self._place)!r} has {len(found)} images that {str(file)!r} may be: give the files by paths as "
                "long as its `file_name`s."
            )
        return found[0]

    def category(self, name: str) -> Any:
        """Of a class.

        Raises:
            ConfigError: there is none of this name.
        """
        if name not in self._categories:
            raise ConfigError(f"--annotations: {str(self._place)!r} has no category {name!r}.")
        return self._categories[name]


def coco_results(rows: list[dict[str, Any]], annotations: Path | CocoNumbers) -> list[dict[str, Any]]:
    """Boxes as COCO's results, under the numbers of a COCO json.

    Raises:
        ConfigError: it can't be read, or lacks an image or a category.
    """
    known = CocoNumbers(annotations) if isinstance(annotations, Path) else annotations
    results = []
    for row in rows:
        for one in row.get("objects", ()):
            left, top, right, bottom = one["box"]
            box = [left, top, round(right - left, 2), round(bottom - top, 2)]
            ids = {"image_id": known.image(Path(row["file"])), "category_id": known.category(one["class"])}
            results.append({**ids, "bbox": box, "score": one["score"]})
    return results


def _shared_end(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    """How many of the last parts of two paths are the same."""
    length = 0
    while length < min(len(first), len(second)) and first[-1 - length] == second[-1 - length]:
        length += 1
    return length
