"""The options of the verbs that read no configuration.

They stand apart from what the verbs do, which imports torch: ``--help`` needs none of it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ssl_pipeline.config.base import closest

# What each is, and its name under `exports/` beside the model.
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
    """Takes options as they are spelled: ``--config`` is no short form of ``--config-dir``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        close = closest(unknown[1], self._option_string_actions) if unknown else None
        super().error(f"{message}. Did you mean {close}?" if close else message)


def path(text: str) -> Path:
    """A path as it was typed; ``~`` is the home folder, which a shell leaves alone after ``--output=``."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # `~x`, where no user is called so
        return Path(text)


def prepare() -> Parser:
    """Of ``ssl-pipeline prepare``."""
    parser = Parser(
        prog="ssl-pipeline prepare",
        description="Reads every image once, says what is wrong with which, and makes every start fast.\n\n"
        "What it finds is kept outside the folder, in which nothing is changed: a manifest, the list of bad files and, on\n"
        "wish, the decoded images. Stopped and started again, it goes on where it was; so it does when images were added.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", help="your images, or what a table's paths start from; nothing in it is changed")
    parser.add_argument(
        "--data", choices=[*LEVELS_OF_CLASSES, "webdataset"], default="folder",
        help="which source reads it: `folder` (default) takes train, val and test in it for splits, `domain_folder` has "
        "domain/class in it, to a `table` its folders mean nothing, and `webdataset` reads tar archives",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FOLDER", help="where to write; `data.prepared` tells a run")
    parser.add_argument(
        "--cache", metavar="PIXELS", type=int, default=0,
        help="also write the decoded images, shorter side at most so many pixels; `data.cache=true` reads them",
    )  # fmt: skip
    parser.add_argument("--recheck", action="store_true", help="read unchanged files again, and compare their digests")
    return parser


def predict() -> Parser:
    """Of ``ssl-pipeline predict``."""
    parser = Parser(
        prog="ssl-pipeline predict",
        description="What a model says of raw image files: classes, labels, numbers, masks or boxes.",
    )
    parser.add_argument("model", help="a stage-two run's folder, its model.safetensors, or an exported .pt2 or .onnx")
    parser.add_argument("images", nargs="+", help="image files and folders; - reads paths from the input, one a line")
    parser.add_argument(
        "--format", choices=["text", "csv", "jsonl", "coco"], default="text",
        help="coco: boxes as one json of results, as pycocotools reads them (needs --annotations)",
    )  # fmt: skip
    parser.add_argument("--top", type=int, default=3, help="classes to name for an image (text and jsonl)")
    parser.add_argument(
        "--threshold", type=float, help="least probability of a label, or score of a box (0.5; with --format coco 0)"
    )
    parser.add_argument("--masks", type=path, help="a folder for the masks, a palette PNG each")
    parser.add_argument(
        "--annotations", type=path, help="the COCO json whose numbers of images and categories are meant"
    )
    return parser


def export() -> Parser:
    """Of ``ssl-pipeline export``."""
    forms = "\n".join(f"  {name:<13} {text}" for name, (text, _) in FORMATS.items())
    parser = Parser(
        prog="ssl-pipeline export",
        description="An encoder or a whole model, for others' tools; each is checked as it is written.",
        epilog=f"formats:\n{forms}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", help="a run's folder, or its model.safetensors or encoder.safetensors")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--part", choices=["model", "encoder"], help="the encoder of a model; by default all there is")
    parser.add_argument("--output", type=path, help="file or folder; by default in exports/ beside the model")
    parser.add_argument(
        "--preprocessing", action="store_true", help="put crop, resize and normalization into the graph"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="with --to hub: also send it, to a private repository")
    parser.add_argument("--public", action="store_true", help="with --push: to a public one")
    return parser


def report() -> Parser:
    """Of ``ssl-pipeline report``."""
    parser = Parser(prog="ssl-pipeline report", description="What runs learned, on one page that needs no network.")
    parser.add_argument("run", nargs="+", type=path, help="a run's folder, of any stage, or a folder of run folders")
    parser.add_argument("--output", type=path, help="the page; by default report.html in the one folder, or here")
    parser.add_argument(
        "--watch", nargs="?", type=_seconds, const=10, metavar="SECONDS", help="write it again while a run goes on"
    )
    return parser


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


def temperature() -> Parser:
    """Of ``ssl-pipeline temperature``."""
    parser = Parser(
        prog="ssl-pipeline temperature",
        description="A picture of what the temperature does, from the glossary's example to a real run.",
    )
    parser.add_argument("run", nargs="?", type=path, help="a stage-one run's folder")
    parser.add_argument("--output", type=path, help="an .svg, .png or .pdf file; by default beside the run")
    return parser


def dashboard() -> Parser:
    """Of ``ssl-pipeline dashboard``."""
    parser = Parser(
        prog="ssl-pipeline dashboard",
        description="A W&B workspace with a section for each group of figures; the same command makes it again.",
    )
    parser.add_argument("project", help="ENTITY/PROJECT: a W&B user or team, and its project")
    return parser


PARSERS: dict[str, Callable[[], Parser]] = {
    "prepare": prepare, "predict": predict, "export": export, "report": report, "temperature": temperature,
    "dashboard": dashboard,
}  # fmt: skip
