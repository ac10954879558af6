"""Images with boxes from a JSON file of COCO's form, for object detection."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, joined, shorten
from ssl_pipeline.data.bad_files import BadFiles, BadFilesLimit, Limit, for_all, parse_limit, raise_all
from ssl_pipeline.data.decode import upright_size
from ssl_pipeline.data.image_files import FileDataset
from ssl_pipeline.data.source import HoldOutConfig, Images
from ssl_pipeline.data.splits import Split
from ssl_pipeline.data.targets import Boxes

Row = dict[str, Any]
Categories = tuple[tuple[int, str], ...]  # ids, which may have gaps, and names; their order is that of the classes
_CROWD: dict[Any, int] = {None: 0, 0: 0, 1: 1, "0": 0, "1": 1}
_log = logging.getLogger("ssl_pipeline")


class Config(HoldOutConfig):
    """A JSON file with ``images``, ``annotations`` and ``categories``, and the folder of its images.

    Boxes that reach out of their image are cut off at its edge; from regions marked ``iscrowd`` nothing is learned, and what is found
    in them counts neither for nor against a model; an image without an annotation shows no object.

    Attributes:
        path: the JSON file of the training images.
        images: the folder that ``file_name`` starts from; null for the file's own, or ``images`` beside it.
        val_path: another JSON file, for choices; null holds images out.
        test_path: another JSON file, for the final results; null holds images out.
        channels: 3 for RGB, 1 for grayscale.
        max_bad_files: how many annotations that can't be used (a box without height, a category that is not there) and images that
            can't be read are left out, ``20`` or ``1%`` of all. More stop the run, with a list.
    """

    path: str
    images: str | None = None
    val_path: str | None = None
    test_path: str | None = None
    channels: Literal[1, 3] = 3
    max_bad_files: Limit = parse_limit("1%")

    def read_images(self) -> Images:
        categories, train = self._read(self.path, None)
        paths: dict[Split, str | None] = {"val": self.val_path, "test": self.test_path}
        own = {split: partial(self._open_own, path, categories) for split, path in paths.items() if path is not None}
        return Images(train, torch.zeros(len(train), dtype=torch.int64), own)

    def _open_own(self, path: str, categories: Categories) -> FileDataset:
        return self._read(path, categories)[1]

    def _read(self, path: str, known: Categories | None) -> tuple[Categories, FileDataset]:
        folder = Path(path).expanduser().resolve().parent
        root = folder / "images" if (folder / "images").is_dir() else folder
        if self.images is not None:
            root = Path(self.images).expanduser().resolve()
        return _read(Path(path).expanduser(), root, known, self.channels, self.max_bad_files)


@lru_cache(maxsize=8)
def _read(
    path: Path, root: Path, known: Categories | None, channels: int, limit: BadFilesLimit
) -> tuple[Categories, FileDataset]:
    """Reads a file once in the process's life; another split has the training file's categories."""
    record = _load(path)
    categories = _categories(_rows(record, "categories", path, ("id", "name")), path)
    if known is not None and categories != known:
        found, trained = (joined([f"{number} {name}" for number, name in one]) for one in (categories, known))
        raise ConfigError(
            f"{path} has other categories than training: {found} against {trained}. Give both files the same."
        )
    images = sorted(_rows(record, "images", path, ("id", "file_name")), key=lambda image: str(image["file_name"]))
    if len(images) < 2:
        raise ConfigError(f"{path} names {len(images)} image(s), and at least two are needed.")
    _check_images(images, path)
    names = [str(image["file_name"]) for image in images]
    files = [root / name for name in names]
    raise_all(
        [
            f"{file} is not there: mend `file_name`, or say where images are by `data.images`."
            for file in files
            if not file.is_file()
        ]
    )
    sizes = for_all(files, upright_size)
    raise_all([fault for image, size in zip(images, sizes, strict=True) if (fault := _other_size(image, size, path))])
    rows = _rows(record, "annotations", path, ("image_id", "category_id", "bbox"))
    boxes, crowds = _boxes_of(images, sizes, rows, categories, path, limit)
    annotations = Boxes(
        [of_image[0] for of_image in boxes], [of_image[1] for of_image in boxes], torch.tensor(sizes),
        tuple(name for _, name in categories), crowds,
    )  # fmt: skip
    source = FileDataset(str(path), root, names, channels, bad_files=BadFiles(limit, len(names)))
    return categories, source.with_annotations(annotations)


def _load(path: Path) -> Row:
    if not path.is_file():
        raise ConfigError(f"`data.path`: there is no file {str(path)!r}: give a JSON file of COCO's form.")
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is no whole JSON file ({error}): write it anew.") from error
    if not isinstance(record, dict):
        raise ConfigError(
            f"{path} holds a {type(record).__name__}, and COCO's form is an object with images, annotations, categories."
        )
    return record


def _rows(record: Row, key: str, path: Path, needed: tuple[str, ...]) -> list[Row]:
    rows = record.get(key)
    if not isinstance(rows, list):
        raise ConfigError(f"{path} has no list `{key}`: COCO's form has images, annotations and categories.")
    for place, row in enumerate(rows):
        lacking = [name for name in needed if not isinstance(row, dict) or name not in row]
        if lacking:
            raise ConfigError(
                f"{path}: entry {place} of `{key}` has no {', '.join(map(repr, lacking))}: it needs {', '.join(needed)}."
            )
    return rows


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse_twice(values: Sequence[Any], sentence: str, mend: str) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ConfigError(f"{sentence} {twice[0]!r} ({len(twice)} such): {mend}.")


def _categories(rows: Sequence[Row], path: Path) -> Categories:
    """The classes, in the order of their ids; with one id or name twice, boxes would go to the wrong class."""
    wrong = [f"{row['name']!r} has the id {row['id']!r}" for row in rows if not _is_whole(row["id"])]
    if wrong:
        raise ConfigError(f"{path}: ids of `categories` must be whole numbers, and {joined(wrong)}: number them.")
    for key in ("id", "name"):
        sentence = f"{path}: two entries of `categories` have the {key}"
        _refuse_twice([str(row[key]).strip() for row in rows], sentence, "give each one of its own, or join them")
    return tuple(sorted((row["id"], str(row["name"]).strip()) for row in rows))


def _check_images(rows: Sequence[Row], path: Path) -> None:
    """Refuses images that can't be told apart, and sizes that are no numbers."""
    problems = [
        f"{path}: image {row['file_name']!r} has the id {row['id']!r}, and a number or a text was expected."
        for row in rows
        if isinstance(row["id"], bool) or not isinstance(row["id"], int | str)
    ]
    problems += [
        f"{path}: image {row['file_name']!r} has the {key} {row[key]!r}, and a whole number was expected."
        for row in rows
        for key in ("width", "height")
        if not _is_whole(size := row.get(key))
        and size is not None
        and not (isinstance(size, float) and size.is_integer())
    ]
    raise_all(problems)
    for key, mend in (
        ("id", "number them anew"),
        ("file_name", "join their entries, or a test image may be trained on"),
    ):
        _refuse_twice([row[key] for row in rows], f"{path}: more than one entry of `images` has the {key}", mend)


def _other_size(image: Row, size: tuple[int, int], path: Path) -> str | None:
    declared = tuple(
        side if image.get(key) is None else image[key] for key, side in zip(("height", "width"), size, strict=True)
    )
    if declared == size:
        return None
    return (
        f"{path}: {image['file_name']} is declared with {declared[1]}×{declared[0]} pixels, and the file has {size[1]}×{size[0]} "
        "(after EXIF rotation): its boxes would be elsewhere. Take the file that was annotated, or annotate this one."
    )


def _boxes_of(
    images: list[Row],
    sizes: list[tuple[int, int]],
    annotations: list[Row],
    categories: Categories,
    path: Path,
    limit: BadFilesLimit,
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Per image its boxes (n, 4) and labels (n,), and both of its crowds; annotations that can't be used are left out."""
    size_of = {image["id"]: size for image, size in zip(images, sizes, strict=True)}
    number_of = {category: number for number, (category, _) in enumerate(categories)}
    found: dict[Any, tuple[list[Any], list[Any]]] = {image["id"]: ([], []) for image in images}
    cut, problems = 0, []
    for place, one in enumerate(annotations):
        what = f"{path}: annotation {one.get('id', f'at place {place}')}"
        if fault := _fault(one, size_of, number_of):
            problems.append(f"{what} {fault}")
            continue
        is_crowd, bbox = _CROWD[one.get("iscrowd")], one["bbox"]
        box, fault = _inside(bbox, size_of[one["image_id"]])
        if not fault:
            cut += not is_crowd and box != [*bbox[:2], bbox[0] + bbox[2], bbox[1] + bbox[3]]
            found[one["image_id"]][is_crowd].append((box, number_of[one["category_id"]]))
        elif not is_crowd:
            problems.append(f"{what} on image {one['image_id']!r}: {fault}. Mend the box, or take it out.")
    if len(problems) > limit.of(len(annotations)):
        end = (
            f"{len(problems)} of {len(annotations)} annotations in {path} can't be used, and `data.max_bad_files={limit}` allows "
            f"{limit.of(len(annotations))}: mend them, or raise the limit to leave them out."
        )
        raise ConfigError([*shorten(problems), end])
    regions = sum(len(crowds) for _, crowds in found.values())
    if problems:
        _log.warning("left out %d of %d annotations, such as: %s", len(problems), len(annotations), problems[0])
    if cut:
        _log.warning(
            "%s: %d of %d boxes reach out of their image and are cut off at its edge", path, cut, len(annotations)
        )
    if regions:
        _log.warning("%s: %d regions marked iscrowd are neither learned from nor measured", path, regions)
    boxes, crowds = ([_tensors(found[image["id"]][side]) for image in images] for side in (0, 1))
    return boxes, crowds


def _fault(row: Row, size_of: Row, number_of: dict[int, int]) -> str | None:
    """What is wrong with an annotation's ids."""
    crowd = row.get("iscrowd")
    for key in ("image_id", "category_id"):
        if not isinstance(row[key], int | str):
            return f"has the {key} {row[key]!r}, and a number was expected."
    if not isinstance(crowd, int | float | str | None) or crowd not in _CROWD:
        return f"has `iscrowd` {crowd!r}, and 0 or 1 was expected."
    if row["image_id"] not in size_of:
        return f"is of image {row['image_id']!r}, and no image has that id."
    if row["category_id"] not in number_of:
        return f"is of category {row['category_id']!r}, and no category has that id."
    return None


def _tensors(found: list[tuple[list[float], int]]) -> tuple[Tensor, Tensor]:
    boxes = torch.tensor([box for box, _ in found], dtype=torch.float32).reshape(-1, 4)
    return boxes, torch.tensor([label for _, label in found], dtype=torch.int64)


def _inside(bbox: Any, size: tuple[int, int]) -> tuple[list[float], str | None]:
    """A box (left, top, width, height) as (left, top, right, bottom) inside its image; or what is wrong with it."""
    numbers = isinstance(bbox, list) and len(bbox) == 4 and all(isinstance(value, int | float) for value in bbox)
    if not numbers or not all(abs(value) < 1e9 for value in bbox):
        return [], f"`bbox` is {bbox!r}, and four numbers were expected: left, top, width, height"
    left, top, width, height = bbox
    if width <= 0 or height <= 0:
        return [], f"the box {bbox} has no area"
    box = [max(left, 0), max(top, 0), min(left + width, size[1]), min(top + height, size[0])]
    if box[2] <= box[0] or box[3] <= box[1]:
        return [], f"the box {bbox} lies outside of its image of {size[1]}×{size[0]} pixels"
    return box, None
