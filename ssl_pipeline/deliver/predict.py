"""``ssl-pipeline predict MODEL IMAGES…``: classes and probabilities for raw image files, end to end."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ssl_pipeline.config.base import ConfigError, UserError
from ssl_pipeline.config.command import leave
from ssl_pipeline.data.decode import DecodeError, decode
from ssl_pipeline.data.scan import ENDINGS
from ssl_pipeline.deliver.model import Model, load_model

_CHUNK = 64


def image_files(paths: Sequence[str]) -> list[Path]:
    """The files that are meant: files as they are, folders with all images in and below them.

    Raises:
        ConfigError: a path is not there, or a folder holds no image.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS)
            if not found:
                raise ConfigError(f"{str(path)!r} holds no image.")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise ConfigError(f"there is no file or folder {str(path)!r}.")
    return files


def predict(model: Model, files: Sequence[Path], top: int = 3) -> Iterator[dict[str, Any]]:
    """Predicts file by file.

    Args:
        model: a loaded model.
        files: image files.
        top: how many classes to name, most probable first.

    Yields:
        ``file`` with ``classes`` and ``probabilities``; or with ``error``, where the file is no image.
    """
    classes = model.card.classes
    assert classes is not None
    for start in range(0, len(files), _CHUNK):
        images, faults = {}, {}
        for file in files[start : start + _CHUNK]:
            try:
                images[file] = decode(file, model.channels)
            except DecodeError as error:
                faults[file] = error.fault
        chances = torch.softmax(model.predict(list(images.values())), 1) if images else torch.empty(0, len(classes))
        ranked = dict(zip(images, chances, strict=True))
        for file in files[start : start + _CHUNK]:
            if file in faults:
                yield {"file": str(file), "error": faults[file]}
                continue
            values, places = ranked[file].topk(min(top, len(classes)))
            names = [classes[place] for place in places.tolist()]
            yield {"file": str(file), "classes": names, "probabilities": [round(v, 4) for v in values.tolist()]}


def _write(rows: Iterator[dict[str, Any]], form: str) -> int:
    """Writes rows as they come; returns how many files were no images."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    if form == "csv":
        table.writerow(["file", "class", "probability", "error"])
    faults = 0
    for row in rows:
        faults += "error" in row
        if form == "jsonl":
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
        elif form == "csv":
            best = ["", "", row["error"]] if "error" in row else [row["classes"][0], row["probabilities"][0], ""]
            table.writerow([row["file"], *best])
        else:
            text = row.get("error") or "  ".join(
                f"{name} {chance:.1%}" for name, chance in zip(row["classes"], row["probabilities"], strict=True)
            )
            sys.stdout.write(f"{row['file']}  {text}\n")
    return faults


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="ssl-pipeline predict", description=__doc__)
    parser.add_argument("model", help="a stage-two run's folder, or its model.safetensors")
    parser.add_argument("images", nargs="+", help="image files and folders")
    parser.add_argument("--format", choices=["text", "csv", "jsonl"], default="text")
    parser.add_argument("--top", type=int, default=3, help="classes to name for an image (text and jsonl)")
    options = parser.parse_args()
    try:
        if options.top < 1:
            raise ConfigError("--top must be 1 or more.")
        faults = _write(predict(load_model(options.model), image_files(options.images), options.top), options.format)
    except UserError as error:
        leave(error)
    if faults:
        leave(ConfigError(f"{faults} file(s) could not be read as images; all others were predicted."))


if __name__ == "__main__":
    main()
