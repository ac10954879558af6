"""``ssl-pipeline predict MODEL IMAGES…``: predictions for image files: classes, labels, numbers, masks or boxes."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ssl_pipeline.config import options as parsers
from ssl_pipeline.config.base import ConfigError, UserError
from ssl_pipeline.config.command import exit_with_error
from ssl_pipeline.data.decode import DecodeError, decode
from ssl_pipeline.data.scan import images_in
from ssl_pipeline.downstream.load_model import load_model
from ssl_pipeline.export.formatters import CocoIds, PredictionFormatter, build_formatter, coco_results
from ssl_pipeline.export.graph import load_onnx, load_torch_export

_CHUNK = 64
_CHUNK_OF_MAPS = 8


class Predictor(Protocol):
    """A model of ours, or a graph that was exported from one; see :class:`~ssl_pipeline.downstream.load_model.Model`."""

    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def channels(self) -> int: ...
    @property
    def value_range(self) -> tuple[float, float] | None: ...
    @property
    def gives(self) -> str: ...
    def predict(self, images: list[Image.Image]) -> Any: ...


def open_predictor(path: str | Path) -> Predictor:
    """A stage-two run's folder, a ``.safetensors`` of it, a ``.pt2`` or a ``.onnx``.

    Raises:
        ConfigError: it is not there, damaged, or of another kind.
    """
    file = parsers.path(str(path))
    readers = {".onnx": load_onnx, ".pt2": load_torch_export}
    if file.suffix in readers and not file.is_dir():
        if not file.is_file():
            raise ConfigError(f"there is no file {str(path)!r}.")
        return readers[file.suffix](file)
    return load_model(file)


def image_files(paths: Iterable[str]) -> Iterator[Path]:
    """The files of paths: a file itself, all images in and below a folder, and for ``-`` the lines of the standard input.

    A missing path on the command line is an error at once; one of the standard input is an image that can't be read.

    Raises:
        ConfigError: a path is not there, or a folder holds no image.
    """
    return chain.from_iterable([_files(path) for path in paths])  # a list, so that all are looked up now


def _files(given: str) -> Iterable[Path]:
    if given == "-":
        return (parsers.path(line.rstrip("\n")) for line in sys.stdin if line.strip())
    path = parsers.path(given)
    if not path.exists():
        raise ConfigError(f"there is no file or folder {str(path)!r}.")
    found = images_in(path) if path.is_dir() else [path]
    if not found:
        raise ConfigError(f"{str(path)!r} holds no image that Pillow reads (hidden files do not count).")
    return found


def predict(
    model: Predictor, files: Iterable[Path], formatter: PredictionFormatter | None = None
) -> Iterator[dict[str, Any]]:
    """Predicts file by file.

    Args:
        model: what predicts.
        files: image files, perhaps without an end: a few are read at a time.
        formatter: makes rows of predictions; by default that of the model's kind.

    Yields:
        ``file`` with the formatter's row; or with ``error``, where the file is no image.
    """
    formatter = formatter or build_formatter(model.gives, model.classes)
    coming = iter(files)
    while part := list(islice(coming, _CHUNK_OF_MAPS if formatter.reads_maps else _CHUNK)):
        images = [_decoded(file, model) for file in part]
        whole = [image for image in images if isinstance(image, Image.Image)]
        predictions = iter(model.predict(whole) if whole else ())
        for file, image in zip(part, images, strict=True):
            if isinstance(image, DecodeError):
                yield {"file": str(file), "error": image.fault}
            else:
                yield {"file": str(file), **formatter.row(file, next(predictions), image)}


def _decoded(file: Path, model: Predictor) -> Image.Image | DecodeError:
    try:
        return decode(file, model.channels, value_range=model.value_range)
    except DecodeError as error:
        return error


def _write(rows: Iterator[dict[str, Any]], form: str, formatter: PredictionFormatter, ids: CocoIds | None) -> int:
    """Writes rows as they come; returns how many files were no images.

    A name that is no text, because its bytes are no UTF-8, comes out as these bytes; in JSON, which must be text, escaped (Python
    reads it back as ``os.fsdecode`` gives it).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
    table = csv.writer(sys.stdout, lineterminator="\n")
    if form == "csv":
        table.writerow(["file", *formatter.columns, "error"])
    faults, found = 0, list[dict[str, Any]]()
    for row in rows:
        faults += "error" in row
        if form == "jsonl":
            sys.stdout.write(_json(row) + "\n")
        elif form == "coco":
            found.append(row)
        elif form == "csv":
            lines = [[""] * len(formatter.columns)] if "error" in row else formatter.cells(row)
            table.writerows([row["file"], *line, row.get("error", "")] for line in lines)
        else:
            sys.stdout.write(f"{row['file']}  {row.get('error') or formatter.text(row)}\n")
    if ids is not None:
        sys.stdout.write(json.dumps(coco_results(found, ids)) + "\n")
    return faults


def _json(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    return text if text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text) else json.dumps(row)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parsers.parser("predict").parse_args(arguments)
    try:
        if options.top < 1:
            raise ConfigError("--top must be 1 or more.")
        if (options.format == "coco") != (options.annotations is not None):
            raise ConfigError("--format coco and --annotations FILE go together.")
        model = open_predictor(options.model)
        if options.format == "coco" and model.gives != "boxes":
            raise ConfigError(f"--format coco is for boxes, and this model gives {model.gives}: take csv or jsonl.")
        ids = CocoIds(options.annotations) if options.annotations is not None else None
        # COCO's precision is measured over all scores: those below a threshold count, too.
        options.threshold = 0.0 if options.threshold is None and ids is not None else options.threshold
        formatter = build_formatter(model.gives, model.classes, options.top, options.threshold, options.masks)
        rows = predict(model, image_files(options.images), formatter)
        faults = _write(rows, options.format, formatter, ids)
    except UserError as error:
        exit_with_error(error)
    if faults:
        exit_with_error(ConfigError(f"{faults} file(s) could not be read as images; all others were predicted."))


if __name__ == "__main__":
    main()
