"""Images with boxes from a JSON file of COCO's form, for object detection."""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.annotated import AnnotatedDataset
from ssl_pipeline.data.bad_files import BadFiles, BadFilesLimit, Limit, parse_limit
from ssl_pipeline.data.boxes import Boxes
from ssl_pipeline.data.coco_record import Categories, categories_of, check_images, leave_out, plain_annotations
from ssl_pipeline.data.image_files import FileDataset
from ssl_pipeline.data.masks import for_all, report_bad_masks, upright_size
from ssl_pipeline.data.source import DecodedConfig, Part
from ssl_pipeline.data.splits import part_of, split_three

_log = logging.getLogger("ssl_pipeline")


class Config(DecodedConfig[AnnotatedDataset]):
    """A JSON file with ``images``, ``annotations`` and ``categories``, and the folder of its images.

    Boxes that reach out of their image are cut off at its edge; from regions marked ``iscrowd`` nothing is learned, and what is found
    in them counts neither for nor against a model; an image without an annotation shows no object.

    Attributes:
        path: the JSON file of the training images.
        images: the folder that ``file_name`` starts from; null for the file's own, or ``images`` beside it.
        dev_path: another JSON file, for choices; null holds images out.
        test_path: another, for the final figures; likewise.
        channels: 3 for RGB, 1 for grayscale.
        dev: the share of training images that is held out for choices where there is no ``dev_path``.
        test: the share held out for the final figures, likewise.
        bad_files: how many annotations that can't be used (a box without height, a category that is not there) and images that
            can't be read are left out, ``20`` or ``1%`` of all. More stop the run, with a list.
        license: of the images, where you know it.
    """

    path: str
    images: str | None = None
    dev_path: str | None = None
    test_path: str | None = None
    channels: Literal[1, 3] = 3
    dev: float = Field(0.1, gt=0, lt=0.5)
    test: float = Field(0.2, gt=0, lt=0.5)
    bad_files: Limit = parse_limit("1%")
    license: str | None = None

    def open_part(self, part: Part) -> AnnotatedDataset:
        """A split, or all images but those of the test.

        Raises:
            ConfigError: a file is missing or damaged, or an annotation fits no image or class.
        """
        paths: dict[Part, str | None] = {"dev": self.dev_path, "test": self.test_path}
        categories, pool = _read(
            Path(self.path).expanduser(), self._root(self.path), None, self.channels, self.bad_files
        )
        own = paths.get(part)
        if own is not None:
            _, source = _read(Path(own).expanduser(), self._root(own), categories, self.channels, self.bad_files)
            return self._licensed(source)
        strata = torch.zeros(len(pool), dtype=torch.int64)
        shares = split_three(strata, None if self.test_path else self.test, None if self.dev_path else self.dev, "coco")
        return self._licensed(part_of(pool, shares, part))

    def _root(self, path: str) -> Path:
        if self.images is not None:
            return Path(self.images).expanduser().resolve()
        folder = Path(path).expanduser().resolve().parent
        return folder / "images" if (folder / "images").is_dir() else folder

    def _licensed(self, source: AnnotatedDataset) -> AnnotatedDataset:
        source.license = self.license
        return source


@lru_cache(maxsize=8)
def _read(
    path: Path, root: Path, known: Categories | None, channels: int, limit: BadFilesLimit
) -> tuple[Categories, AnnotatedDataset]:
    """Reads a file once in the process's life; another split has the training file's categories."""
    record = _load(path)
    categories = categories_of(_rows(record, "categories", path, ("id", "name")), path)
    if known is not None and categories != known:
        raise ConfigError(
            f"{path} has other categories than training: {_told(categories)} against {_told(known)}. Give both files the same."
        )
    images = sorted(_rows(record, "images", path, ("id", "file_name")), key=lambda image: str(image["file_name"]))
    if len(images) < 2:
        raise ConfigError(f"{path} names {len(images)} image(s), and at least two are needed.")
    check_images(images, path)
    files = [root / str(image["file_name"]) for image in images]
    report_bad_masks(
        [
            f"{file} is not there: mend `file_name`, or say where images are by `data.images`."
            for file in files
            if not file.is_file()
        ]
    )
    sizes = for_all(files, upright_size)
    report_bad_masks(
        [problem for image, size in zip(images, sizes, strict=True) if (problem := _other_size(image, size, path))]
    )
    boxes, labels, crowds = _boxes_of(
        images, sizes, _rows(record, "annotations", path, ("image_id", "category_id", "bbox")), categories, path, limit
    )
    names = [str(image["file_name"]) for image in images]
    annotations = Boxes(boxes, labels, torch.tensor(sizes), tuple(name for _, name in categories), crowds)
    return categories, AnnotatedDataset(
        FileDataset(str(path), root, names, channels, bad_files=BadFiles(limit, len(names))), annotations
    )


def _load(path: Path) -> dict[str, Any]:
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


def _rows(record: dict[str, Any], key: str, path: Path, needed: tuple[str, ...]) -> list[dict[str, Any]]:
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


def _other_size(image: dict[str, Any], size: tuple[int, int], path: Path) -> str | None:
    said = tuple(
        side if image.get(key) is None else image[key] for key, side in zip(("height", "width"), size, strict=True)
    )
    if said == size:
        return None
    return (
        f"{path}: {image['file_name']} is said to have {said[1]}×{said[0]} pixels, and the file has {size[1]}×{size[0]} (as EXIF "
        "turns it): its boxes would be elsewhere. Take the file that was annotated, or annotate this one."
    )


def _boxes_of(
    images: list[dict[str, Any]],
    sizes: list[tuple[int, int]],
    annotations: list[dict[str, Any]],
    categories: Categories,
    path: Path,
    limit: BadFilesLimit,
) -> tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Per image its boxes and labels, and both of its crowds."""
    size_of = {image["id"]: size for image, size in zip(images, sizes, strict=True)}
    number_of = {category: number for number, (category, _) in enumerate(categories)}
    found: dict[Any, list[tuple[list[float], int]]] = {image["id"]: [] for image in images}
    crowds: dict[Any, list[tuple[list[float], int]]] = {image["id"]: [] for image in images}
    cut, count = 0, len(annotations)
    annotations, problems = plain_annotations(annotations, path)
    for place, one in enumerate(annotations):
        what = f"{path}: annotation {one.get('id', f'at place {place}')}"
        if one["image_id"] not in size_of:
            problems.append(f"{what} is of image {one['image_id']!r}, and no image has that id.")
        elif one["category_id"] not in number_of:
            problems.append(f"{what} is of category {one['category_id']!r}, and no category has that id.")
        elif one.get("iscrowd"):
            box, fault = _inside(one["bbox"], size_of[one["image_id"]])
            if not fault:
                crowds[one["image_id"]].append((box, number_of[one["category_id"]]))
        else:
            box, fault = _inside(one["bbox"], size_of[one["image_id"]])
            if fault:
                problems.append(f"{what} on image {one['image_id']!r}: {fault}. Mend the box, or take it out.")
            else:
                cut += (
                    box[2:] != [one["bbox"][0] + one["bbox"][2], one["bbox"][1] + one["bbox"][3]]
                    or box[:2] != one["bbox"][:2]
                )
                found[one["image_id"]].append((box, number_of[one["category_id"]]))
    leave_out(problems, count, limit, path)
    if cut:
        _log.warning(
            "%s: %d of %d boxes reach out of their image and are cut off at its edge", path, cut, len(annotations)
        )
    count = sum(map(len, crowds.values()))
    if count:
        _log.warning(
            "%s: from %d regions marked iscrowd nothing is learned, and nothing in them is measured", path, count
        )
    boxes, labels = zip(*(_tensors(found[image["id"]]) for image in images), strict=True)
    return list(boxes), list(labels), [_tensors(crowds[image["id"]]) for image in images]


def _tensors(found: list[tuple[list[float], int]]) -> tuple[Tensor, Tensor]:
    """Boxes of shape (n, 4), and labels of shape (n,)."""
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


def _told(categories: Categories) -> str:
    return ", ".join(f"{number} {name}" for number, name in categories[:10])
