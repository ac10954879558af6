"""The options of the verbs that read no configuration: here, so that ``--help`` imports no torch."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

from ssl_pipeline.config.base import closest

# What each format is, and its name under `exports/` beside the model.
FORMATS = {
    "safetensors": ("a folder of safetensors and card.json, which every verb of ours reads", "safetensors"),
    "torchvision": ("a state dict that torchvision loads strictly", "torchvision.safetensors"),
    "timm": ("a state dict that timm loads strictly", "timm.safetensors"),
    "torch.export": ("a graph for torch, without our code", "model.pt2"),
    "onnx": ("a graph for onnxruntime and others", "model.onnx"),
    "hub": ("a folder with a model card for the Hugging Face Hub", "hub"),
}
LEVELS_OF_CLASSES = {"folder": 1, "domain_folder": 2, "table": 0}  # 0: folders are no classes


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations: ``--config`` is no short form of ``--config-dir``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        close = closest(unknown[1], self._option_string_actions) if unknown else None
        super().error(f"{message}. Did you mean {close}?" if close else message)


def path(text: str) -> Path:
    """A path; ``~`` is the home folder, also after ``--output=``, where a shell leaves it alone."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # `~x`, where no user is called so
        return Path(text)


def _seconds(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no whole number of seconds: name the runs before --watch, or write --watch 10"
        ) from None
    if value < 1:
        raise argparse.ArgumentTypeError("give 1 second or more")
    return value


# Of each verb its description, its arguments as `add_argument` takes them, and what follows them in the help.
_VERBS: dict[str, tuple[str, dict[str, dict[str, Any]], str]] = {
    "prepare": (
        "Reads every image once, lists damaged files, and makes every start fast.\n\n"
        "Nothing in the folder is changed: the manifest, the list of bad files and, on request, the decoded images are kept\n"
        "elsewhere. Started again, it continues where it was, and reads only what was added.",
        {
            "folder": {"help": "your images, or the folder that a table's paths are relative to"},
            "--data": {
                "choices": [*LEVELS_OF_CLASSES, "webdataset"], "default": "folder",
                "help": "what is in it: `folder` (default): images, or the splits train, val and test; `domain_folder`: "
                "domain/class; `table`: the images of a table; `webdataset`: tar archives",
            },
            "--output": {"metavar": "FOLDER", "help": "where to write; a run reads it with `data.prepared`"},
            "--cache": {
                "metavar": "PIXELS", "type": int, "default": 0,
                "help": "also write the decoded images, shorter side at most this; a run reads them with `data.cache=true`",
            },
            "--recheck": {"action": "store_true", "help": "read unchanged files again, and compare their digests"},
        },
        "",
    ),
    "predict": (
        "Predictions for image files: classes, labels, numbers, masks or boxes.",
        {
            "model": {"help": "a stage-two run's folder, its model.safetensors, or an exported .pt2 or .onnx"},
            "images": {"nargs": "+", "help": "image files and folders; - reads paths from the input, one a line"},
            "--format": {
                "choices": ["text", "csv", "jsonl", "coco"], "default": "text",
                "help": "coco: boxes as one json of results, as pycocotools reads them (needs --annotations)",
            },
            "--top": {"type": int, "default": 3, "help": "classes to list for an image (text and jsonl)"},
            "--threshold": {
                "type": float, "help": "minimum probability of a label, or score of a box (0.5; with --format coco 0)",
            },
            "--masks": {"type": path, "help": "a folder for the masks, as palette PNG files"},
            "--annotations": {"type": path, "help": "the COCO json with the numbers of images and categories"},
        },
        "",
    ),
    "export": (
        "An encoder or a whole model, for other tools; each file is checked as it is written.",
        {
            "model": {"help": "a run's folder, or its model.safetensors or encoder.safetensors"},
            "--to": {"required": True, "metavar": "FORMAT", "help": ", ".join(FORMATS)},
            "--part": {"choices": ["model", "encoder"], "help": "only the encoder of a model; by default everything"},
            "--output": {"type": path, "help": "file or folder; by default in exports/ beside the model"},
            "--preprocessing": {"action": "store_true", "help": "put crop, resize and normalization into the graph"},
            "--push": {"metavar": "OWNER/NAME", "help": "with --to hub: also send it, to a private repository"},
            "--public": {"action": "store_true", "help": "with --push: to a public one"},
        },
        "\n".join(["formats:", *(f"  {name:<13} {text}" for name, (text, _) in FORMATS.items())]),
    ),
    "report": (
        "What runs learned, on one page that needs no network.",
        {
            "run": {"nargs": "+", "type": path, "help": "a run's folder, of any stage, or a folder of run folders"},
            "--output": {"type": path, "help": "the page; by default report.html in the one folder, or here"},
            "--watch": {
                "nargs": "?", "type": _seconds, "const": 10, "metavar": "SECONDS", "help": "write it again while a run goes on",
            },
        },
        "",
    ),
    "plot-temperature": (
        "A picture of what the temperature does, in the glossary's example and in a run.",
        {
            "run": {"nargs": "?", "type": path, "help": "a stage-one run's folder"},
            "--output": {"type": path, "help": "an .svg, .png or .pdf file; by default beside the run"},
        },
        "",
    ),
    "dashboard": (
        "A W&B workspace with a section for each group of metrics.",
        {"project": {"help": "ENTITY/PROJECT: a W&B user or team, and its project"}},
        "",
    ),
}  # fmt: skip


def parser(verb: str) -> Parser:
    """The parser of a verb that reads no configuration."""
    description, arguments, epilog = _VERBS[verb]
    found = Parser(
        prog=f"ssl-pipeline {verb}", description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    for name, options in arguments.items():
        found.add_argument(name, **options)
    return found
