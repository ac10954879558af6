"""Generated images whose right answer is known: squares and circles on noise, with their masks, boxes and numbers."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("background", "square", "circle")


@dataclass
class Scene:
    """An image, uint8 (H, W, 3); its mask, uint8 (H, W), of the places in ``NAMES``; boxes (x, y, w, h) and their classes."""

    image: np.ndarray
    mask: np.ndarray
    boxes: list[list[int]]
    kinds: list[int]


def scene(seed: int, height: int = 32, width: int = 32, most: int = 2) -> Scene:
    """Up to ``most`` shapes, the later ones in front; a shape that is mostly covered is not drawn."""
    rng = np.random.default_rng(seed)
    image = rng.integers(60, 120, (height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    boxes, kinds = [], []
    rows, columns = np.mgrid[:height, :width]
    for _ in range(int(rng.integers(1, most + 1))):
        side = int(rng.integers(10, 16))
        top, left = int(rng.integers(0, height - side)), int(rng.integers(0, width - side))
        kind = int(rng.integers(1, 3))
        inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        if kind == 2:
            center = (side - 1) / 2
            inside &= (rows - top - center) ** 2 + (columns - left - center) ** 2 <= (side / 2) ** 2
        if mask[inside].any():
            continue
        mask[inside] = kind
        image[inside] = ([230, 60, 60] if kind == 1 else [60, 60, 230]) + rng.integers(-20, 20, 3)
        boxes.append([left, top, side, side])
        kinds.append(kind)
    return Scene(image, mask, boxes, kinds)


def mask_folder(root: Path, count: int, **options: int) -> Path:
    """``images``, ``masks`` and ``classes.txt``."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for i in range(count):
        one = scene(i, **options)
        Image.fromarray(one.image).save(root / "images" / f"{i:03d}.png")
        Image.fromarray(one.mask).save(root / "masks" / f"{i:03d}.png")
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root


def box_folder(root: Path, count: int, **options: int) -> Path:
    """``images`` and ``annotations.json``, as COCO has them; category numbers have gaps."""
    (root / "images").mkdir(parents=True)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for i in range(count):
        one = scene(i, **options)
        Image.fromarray(one.image).save(root / "images" / f"{i:03d}.png")
        height, width = one.mask.shape
        images.append({"id": 100 + i, "file_name": f"{i:03d}.png", "height": height, "width": width})
        for box, kind in zip(one.boxes, one.kinds, strict=True):
            annotations.append({"id": len(annotations), "image_id": 100 + i, "category_id": 10 * kind, "bbox": box})
    categories = [{"id": 10 * kind, "name": NAMES[kind]} for kind in (1, 2)]
    record = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations.json").write_text(json.dumps(record))
    return root


def number_table(root: Path, count: int, unknown: float = 0.1) -> Path:
    """``table.csv``: is there a square, is there a circle, how much of the image is red; some cells are empty."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        one = scene(i)
        Image.fromarray(one.image).save(root / f"{i:03d}.png")
        cells = [int(1 in one.kinds), int(2 in one.kinds), round(float((one.mask == 1).mean()), 4)]
        rows.append([f"{i:03d}.png", *("" if rng.random() < unknown else cell for cell in cells)])
    with (root / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "square", "circle", "red"], *rows])
    return root / "table.csv"
