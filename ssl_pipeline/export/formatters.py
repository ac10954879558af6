"""Predictions as rows: classes, labels, values, a mask or boxes; boxes also as COCO's results."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ConfigError

Cells = list[list[Any]]


class PredictionFormatter(ABC):
    """Makes rows of predictions.

    Attributes:
        names: of the classes or values, in the order of the predictions.
        columns: of a table, between ``file`` and ``error``.
        reads_maps: whether the model reads whole images, of which memory holds few at a time.
    """

    reads_maps: ClassVar[bool] = False
    columns: list[str]

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.columns = list(names)

    @abstractmethod
    def row(self, file: Path, prediction: Any, image: Image.Image) -> dict[str, Any]:
        """A prediction as plain values."""

    @abstractmethod
    def cells(self, row: dict[str, Any]) -> Cells:
        """A row as lines of a table."""

    @abstractmethod
    def text(self, row: dict[str, Any]) -> str:
        """A row for people."""


class Classes(PredictionFormatter):
    """The most probable classes."""

    def __init__(self, names: tuple[str, ...], top: int) -> None:
        super().__init__(names)
        self.columns, self.top = ["class", "probability"], min(top, len(names))

    def row(self, file: Path, prediction: Tensor, image: Image.Image) -> dict[str, Any]:
        values, places = (found.tolist() for found in prediction.float().softmax(0).topk(self.top))
        return {"classes": [self.names[i] for i in places], "probabilities": [round(value, 4) for value in values]}

    def cells(self, row: dict[str, Any]) -> Cells:
        return [[row["classes"][0], row["probabilities"][0]]]

    def text(self, row: dict[str, Any]) -> str:
        return "  ".join(
            f"{name} {value:.1%}" for name, value in zip(row["classes"], row["probabilities"], strict=True)
        )


class Labels(PredictionFormatter):
    """The labels whose probability reaches the threshold, and the probabilities of all."""

    def __init__(self, names: tuple[str, ...], threshold: float) -> None:
        super().__init__(names)
        self.threshold = threshold

    def row(self, file: Path, prediction: Tensor, image: Image.Image) -> dict[str, Any]:
        chances = dict(zip(self.names, prediction.float().sigmoid().tolist(), strict=True))
        held = [name for name, chance in chances.items() if chance >= self.threshold]
        return {"labels": held, "probabilities": {name: round(chance, 4) for name, chance in chances.items()}}

    def cells(self, row: dict[str, Any]) -> Cells:
        return [list(row["probabilities"].values())]

    def text(self, row: dict[str, Any]) -> str:
        return "  ".join(f"{name} {row['probabilities'][name]:.1%}" for name in row["labels"]) or "none"


class Values(PredictionFormatter):
    """Numbers, in their own units."""

    def row(self, file: Path, prediction: Tensor, image: Image.Image) -> dict[str, Any]:
        return {"values": dict(zip(self.names, prediction.float().tolist(), strict=True))}

    def cells(self, row: dict[str, Any]) -> Cells:
        return [list(row["values"].values())]

    def text(self, row: dict[str, Any]) -> str:
        return "  ".join(f"{name} {value:.4g}" for name, value in row["values"].items())


class Mask(PredictionFormatter):
    """The class of every pixel of the image itself, as a palette PNG, and what share of the pixels each class has."""

    reads_maps = True

    def __init__(self, names: tuple[str, ...], folder: Path | None) -> None:
        super().__init__(names)
        self.columns, self.folder, self._taken = ["mask", *names], folder, set[Path]()
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"--masks: {str(folder)!r} can't be made ({error.strerror}).") from error

    def row(self, file: Path, prediction: Tensor, image: Image.Image) -> dict[str, Any]:
        size = (image.height, image.width)
        logits = F.interpolate(prediction[None].float(), size, mode="bilinear", align_corners=False)[0]
        classes = logits.argmax(0).to(torch.uint8).cpu()
        counts = classes.flatten().long().bincount(minlength=len(self.names)).tolist()
        shares = {name: round(count / classes.numel(), 6) for name, count in zip(self.names, counts, strict=True)}
        return {"mask": self._save(file, classes), "shares": shares}

    def _save(self, file: Path, classes: Tensor) -> str | None:
        if self.folder is None:
            return None
        place, number = self.folder / f"{file.stem}.png", 1
        # Images of one name in several folders; and what lies there already may be the photo itself.
        while place in self._taken or place.exists():
            number += 1
            place = self.folder / f"{file.stem}-{number}.png"
        self._taken.add(place)
        mask = Image.fromarray(classes.numpy())
        mask.putpalette(palette(len(self.names)))
        try:
            mask.save(place)
        except OSError as error:
            raise ConfigError(f"--masks: {str(place)!r} can't be written ({error.strerror}).") from error
        return str(place)

    def cells(self, row: dict[str, Any]) -> Cells:
        return [[row["mask"] or "", *row["shares"].values()]]

    def text(self, row: dict[str, Any]) -> str:
        return "  ".join(f"{name} {share:.1%}" for name, share in row["shares"].items() if share)


class Boxes(PredictionFormatter):
    """Objects, best first, with class, score and box (left, top, right, bottom) in the image's own pixels."""

    reads_maps = True

    def __init__(self, names: tuple[str, ...], threshold: float) -> None:
        super().__init__(names)
        self.columns, self.threshold = ["class", "score", "left", "top", "right", "bottom"], threshold

    def row(self, file: Path, prediction: dict[str, Tensor], image: Image.Image) -> dict[str, Any]:
        scale = torch.tensor([image.width, image.height, image.width, image.height])
        found = zip(*(prediction[key].cpu() for key in ("boxes", "labels", "scores")), strict=True)
        objects = list[dict[str, Any]]()
        for box, label, score in found:
            if float(score) >= self.threshold:
                edges = [round(edge, 2) for edge in (box * scale).tolist()]
                objects.append({"class": self.names[int(label)], "score": round(float(score), 4), "box": edges})
        return {"width": image.width, "height": image.height, "objects": objects}

    def cells(self, row: dict[str, Any]) -> Cells:
        return [[one["class"], one["score"], *one["box"]] for one in row["objects"]] or [[""] * 6]

    def text(self, row: dict[str, Any]) -> str:
        shown = "  ".join(
            "{class} {score:.1%} [{box[0]:.0f}, {box[1]:.0f}, {box[2]:.0f}, {box[3]:.0f}]".format(**one)
            for one in row["objects"]
        )
        return shown or "nothing"


def build_formatter(
    gives: str, names: tuple[str, ...], top: int = 3, threshold: float | None = None, masks: Path | None = None
) -> PredictionFormatter:
    """The formatter of a kind of prediction, ``gives`` (see :class:`DownstreamConfig`).

    ``top`` is how many classes to name, ``threshold`` the least probability of a label or score of a box, ``masks`` a folder for them.

    Raises:
        ConfigError: such predictions are unknown, or an option does not go with them.
    """
    if masks is not None and gives != "mask":
        raise ConfigError(f"--masks is for models of masks, and this one gives {gives}.")
    if threshold is not None and gives not in ("labels", "boxes"):
        raise ConfigError(f"--threshold is for labels and boxes, and this model gives {gives}.")
    least = 0.5 if threshold is None else threshold
    if not 0 <= least <= 1:
        raise ConfigError(f"--threshold is {least:g}, and probabilities and scores lie between 0 and 1.")
    if gives == "classes":
        return Classes(names, top)
    if gives == "labels":
        return Labels(names, least)
    if gives == "values":
        return Values(names)
    if gives == "mask":
        return Mask(names, masks)
    if gives == "boxes":
        return Boxes(names, least)
    raise ConfigError(
        "this model's task says of its predictions neither that they are classes nor values, masks or boxes: from Python, "
        "`load_model(PATH).predict(images)` gives them (ssl_pipeline.downstream.load_model)."
    )


def palette(classes: int) -> list[int]:
    """Colors that differ in every bit of the class's number, as Pascal VOC has them; 0 is black."""
    colors = np.zeros((classes, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= ((np.arange(classes) >> (3 * bit + channel)) & 1).astype(np.uint8) << (7 - bit)
    flat: list[int] = colors.flatten().tolist()
    return flat


class CocoIds:
    """The ids that a COCO json gives to images (by the end of their paths) and categories (by name)."""

    def __init__(self, annotations: Path) -> None:
        self._place = annotations
        try:
            known = json.loads(annotations.read_text(encoding="utf-8"))
            self._images = [(Path(one["file_name"]).parts, one["id"]) for one in known["images"]]
            self._categories = {one["name"]: one["id"] for one in known["categories"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--annotations: {str(annotations)!r} can't be read as COCO's json: {error}.") from error

    def image(self, file: Path) -> Any:
        """The id of the one image whose path shares the longest end with the file's."""
        found = list[Any]()
        for length in range(1, len(file.parts) + 1):
            ending = file.parts[-length:]
            found = [number for parts, number in self._images if parts[-length:] == ending] or found
        if not found:
            raise ConfigError(f"--annotations: {str(self._place)!r} has no image {file.name!r}.")
        if len(found) > 1:
            raise ConfigError(
                f"--annotations: {str(self._place)!r} has {len(found)} images that {str(file)!r} may be: give the files by paths as "
                "long as its `file_name`s."
            )
        return found[0]

    def category(self, name: str) -> Any:
        if name not in self._categories:
            raise ConfigError(f"--annotations: {str(self._place)!r} has no category {name!r}.")
        return self._categories[name]


def coco_results(rows: list[dict[str, Any]], ids: CocoIds) -> list[dict[str, Any]]:
    """Boxes as COCO's results (left, top, width, height), under the ids of a COCO json; a ConfigError where it lacks one."""
    results = []
    for row in rows:
        for one in row.get("objects", ()):
            left, top, right, bottom = one["box"]
            box = [left, top, round(right - left, 2), round(bottom - top, 2)]
            found = {"image_id": ids.image(Path(row["file"])), "category_id": ids.category(one["class"])}
            results.append({**found, "bbox": box, "score": one["score"]})
    return results
