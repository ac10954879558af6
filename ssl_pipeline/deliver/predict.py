"""``ssl-pipeline predict MODEL IMAGES…``: classes and probabilities for raw image files, end to end."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, UserError
from ssl_pipeline.config.command import leave
from ssl_pipeline.data.decode import DecodeError, decode
from ssl_pipeline.data.scan import ENDINGS
from ssl_pipeline.deliver.graph import load_onnx, load_torch_export
from ssl_pipeline.deliver.model import load_classifier

_CHUNK = 64


class Predictor(Protocol):
    """What predicts: a model of ours, or a graph that was made of one."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, in the order of the predictions."""

    @property
    def channels(self) -> int:
        """How images must be decoded: 1 for grey, 3 for RGB."""

    def predict(self, images: list[Image.Image]) -> Tensor:
        """Logits, one row an image."""


def open_predictor(path: str | Path) -> Predictor:
    """A stage-two run's folder, a ``.safetensors`` of it, a ``.pt2`` or a ``.onnx``.

    Raises:
        ConfigError: it is not there, damaged, or of another kind.
    """
    file = Path(path).expanduser()
    readers = {".onnx": load_onnx, ".pt2": load_torch_export}
    if file.suffix in readers and not file.is_dir():
        if not file.is_file():
            raise ConfigError(f"there is no file {str(path)!r}.")
        return readers[file.suffix](file)
    return load_classifier(file)


def image_files(paths: Iterable[str]) -> Iterator[Path]:
    """The files that are meant: files as they are, folders with all images in and below them, ``-`` the lines of the input.

    A path on the command line that is not there is an error at once; one that comes by the input is an image that can't be read.

    Raises:
        ConfigError: a path is not there, or a folder holds no image.
    """
    return chain.from_iterable([_from_input() if path == "-" else _meant(Path(path)) for path in paths])


def _meant(path: Path) -> list[Path]:
    if not path.exists():
        raise ConfigError(f"there is no file or folder {str(path)!r}.")
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS)
    if not found:
        raise ConfigError(f"{str(path)!r} holds no image.")
    return found


def _from_input() -> Iterator[Path]:
    return (Path(line.rstrip("\n")) for line in sys.stdin if line.strip())


def predict(model: Predictor, files: Iterable[Path], top: int = 3) -> Iterator[dict[str, Any]]:
    """Predicts file by file.

    Args:
        model: what predicts.
        files: image files, perhaps without an end: a few are read at a time.
        top: how many classes to name, most probable first.

    Yields:
        ``file`` with ``classes`` and ``probabilities``; or with ``error``, where the file is no image.
    """
    coming = iter(files)
    while part := list(islice(coming, _CHUNK)):
        images, faults = list[Image.Image](), dict[int, str]()
        for place, file in enumerate(part):
            try:
                images.append(decode(file, model.channels))
            except DecodeError as error:
                faults[place] = error.fault
        chances = iter(torch.softmax(model.predict(images).float(), 1) if images else ())
        for place, file in enumerate(part):
            if place in faults:
                yield {"file": str(file), "error": faults[place]}
                continue
            values, places = next(chances).topk(min(top, len(model.classes)))
            names = [model.classes[i] for i in places.tolist()]
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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="ssl-pipeline predict", description=__doc__)
    parser.add_argument("model", help="a stage-two run's folder, its model.safetensors, or an exported .pt2 or .onnx")
    parser.add_argument("images", nargs="+", help="image files and folders; - reads paths from the input, one a line")
    parser.add_argument("--format", choices=["text", "csv", "jsonl"], default="text")
    parser.add_argument("--top", type=int, default=3, help="classes to name for an image (text and jsonl)")
    options = parser.parse_args(arguments)
    try:
        if options.top < 1:
            raise ConfigError("--top must be 1 or more.")
        files = image_files(options.images)
        faults = _write(predict(open_predictor(options.model), files, options.top), options.format)
    except UserError as error:
        leave(error)
    if faults:
        leave(ConfigError(f"{faults} file(s) could not be read as images; all others were predicted."))


if __name__ == "__main__":
    main()
