"""``ssl-pipeline export MODEL --to FORMAT``: an encoder or a whole model for other tools, checked after writing."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_pipeline.config import options as parsers
from ssl_pipeline.config.base import ConfigError, UserError
from ssl_pipeline.config.command import exit_with_error
from ssl_pipeline.config.options import FORMATS
from ssl_pipeline.export import hub
from ssl_pipeline.export.graph import write_onnx, write_torch_export
from ssl_pipeline.export.parts import ExportBundle, Part, open_parts
from ssl_pipeline.export.state_dict import write_state_dict
from ssl_pipeline.logging.progress import console


def default_name(form: str, part: Part | None = None, preprocessing: bool = False) -> str:
    """The name under ``exports/``, another one for each way of exporting; an unknown format is refused later."""
    name = Path(FORMATS.get(form, ("", "x"))[1])
    if part == "encoder":
        name = name.with_stem("encoder" if name.stem == "model" else f"encoder_{name.stem}")
    return str(name.with_stem(f"{name.stem}_preprocessing") if preprocessing else name)


def export(parts: ExportBundle, form: str, path: Path, preprocessing: bool = False) -> list[str]:
    """Writes one format, a key of :data:`FORMATS`, to a file or folder; returns notes for the user, a line each.

    With ``preprocessing`` a graph takes raw uint8 images of any size.

    Raises:
        ConfigError: the format is unknown or can't hold it, or the path can't be written.
    """
    _check(form, path, preprocessing)
    if parts.task is not None and parts.gives in ("boxes", "other") and form in ("torch.export", "onnx"):
        raise ConfigError(
            f"--to {form}: a model of {parts.gives} gives a number of them that depends on the image, which no graph of fixed shapes "
            "holds here: export --to safetensors, which `predict` reads, or its encoder (--part encoder)."
        )
    if parts.task is not None and parts.gives != "classes" and form in ("torchvision", "timm"):
        raise ConfigError(
            f"--to {form}: the library's own networks classify, and this model gives {parts.gives}: export --part encoder, or all of it "
            "--to safetensors."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if form in ("safetensors", "hub"):
            hub.write_folder(parts, path, for_hub=form == "hub")
            sent = f"nothing was sent; --push OWNER/NAME does that. Read {path / 'README.md'} first"
            return [sent] if form == "hub" else []
        if form in ("torchvision", "timm"):
            return write_state_dict(parts, path, "timm" if form == "timm" else "torchvision")
        far = (write_onnx if form == "onnx" else write_torch_export)(parts, path, preprocessing)
        runner = "onnxruntime" if form == "onnx" else "torch"
        takes = "raw uint8 images of any size" if preprocessing else "normalized images"
        return [
            f"takes batches of any length of {takes}; read again in {runner}, it differs from the model by {far:.1e}"
        ]
    except OSError as error:
        raise ConfigError(
            f"--output: {str(path)!r} can't be written ({error.strerror}): choose another place."
        ) from error


def _check(form: str, path: Path, preprocessing: bool) -> None:
    """What can't be, before anything is written."""
    if form not in FORMATS:
        close = difflib.get_close_matches(form.lower(), FORMATS, n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(FORMATS)}."
        raise ConfigError(f"--to: there is no format {form!r}. {hint}")
    if preprocessing and form not in ("torch.export", "onnx"):
        raise ConfigError(f"--preprocessing: {form} holds weights and no graph; torch.export and onnx do.")
    ending = Path(FORMATS[form][1]).suffix
    if ending and path.suffix != ending:
        raise ConfigError(f"--output: {str(path)!r} must end in {ending} for {form}.")
    if not ending and path.is_dir() and any(path.iterdir()) and not (path / "card.json").exists():
        raise ConfigError(f"--output: {str(path)!r} is not empty and holds no model: choose another folder.")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parsers.parser("export").parse_args(arguments)
    try:
        _run(options)
    except UserError as error:
        exit_with_error(error)


def _run(options: Any) -> None:
    if options.push and options.to != "hub":
        raise ConfigError("--push goes with --to hub: the page that it writes is the repository's face.")
    if options.public and not options.push:
        raise ConfigError("--public goes with --push OWNER/NAME.")
    place = parsers.path(options.model)
    beside = (place if place.is_dir() else place.parent) / "exports"
    path = options.output or beside / default_name(options.to, options.part, options.preprocessing)
    _check(options.to, path, options.preprocessing)
    part: Part | None = options.part
    for line in export(open_parts(place, part), options.to, path, options.preprocessing):
        console().print(line, markup=False)
    console().print(f"wrote {path}", markup=False)
    if options.push:
        console().print(f"sent to {hub.push(path, options.push, options.public)}", markup=False)


if __name__ == "__main__":
    main()
