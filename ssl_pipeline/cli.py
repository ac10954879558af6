"""``ssl-pipeline VERB``; each verb is the ``main`` of a module, imported when it runs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

from ssl_pipeline import __version__

VERBS = {
    "prepare": (
        "ssl_pipeline.data.prepare",
        "reads a folder of images once: damaged files are listed, and later starts are fast",
    ),
    "pretrain": ("ssl_pipeline.pretrain", "stage one: a backbone from images without labels"),
    "finetune": ("ssl_pipeline.finetune", "stage two: a model from the backbone and a few labels"),
    "evaluate": (
        "ssl_pipeline.evaluation.evaluate",
        "how good are an encoder's features? kNN, probe, few labels, corruptions",
    ),
    "study": ("ssl_pipeline.study.label_efficiency", "did pretraining help? stage two under several conditions"),
    "study domain": (
        "ssl_pipeline.study.domain",
        "which method helps across domains? every method on every shift",
    ),
    "study leave_one_out": (
        "ssl_pipeline.study.leave_one_out",
        "which method generalizes? each domain left out once; mean and worst",
    ),
    "study open_set": (
        "ssl_pipeline.study.open_set",
        "how well are unknown classes found? over draws of the known ones",
    ),
    "predict": ("ssl_pipeline.export.predict", "classes and probabilities for image files"),
    "embed": ("ssl_pipeline.export.embed", "a data set's features as Parquet or npz, with ids"),
    "neighbors": ("ssl_pipeline.export.neighbors", "the images most similar to one, as a list and a picture"),
    "export": (
        "ssl_pipeline.export.export",
        "an encoder or a model for other tools: torchvision, timm, ONNX, the Hub, …",
    ),
    "plot-views": ("ssl_pipeline.evaluation.plot_views", "a picture of the random views of a data set"),
    "plot-temperature": ("ssl_pipeline.study.plot_temperature", "a picture of what the temperature does, in a run too"),
    "report": ("ssl_pipeline.report.command", "one page that shows what runs learned: curves, images, tables"),
    "dashboard": ("ssl_pipeline.logging.dashboard", "a W&B workspace for a project: curves, pictures, stage two"),
}


def main() -> None:
    """The command line's entry."""
    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if first == "help" and len(sys.argv) > 2:
        sys.argv[1:] = [*sys.argv[2:], "--help"]
        first = sys.argv[1]
    if first in ("--help", "-h", "help"):
        sys.stdout.write(_overview())
        return
    if first in ("--version", "-V"):
        sys.stdout.write(f"ssl-pipeline {__version__}\n")
        return
    verb, rest = verb_of(sys.argv[1:])
    if "--help" in rest or "-h" in rest:
        sys.stdout.write(_help(verb, rest))
        return
    sys.argv[1:] = rest
    try:
        run: Callable[[], None] = importlib.import_module(VERBS[verb][0]).main
        run()
        sys.stdout.flush()
    except KeyboardInterrupt:  # in a verb that can't be resumed, or while its modules are imported
        sys.stderr.write("stopped by Ctrl-C.\n")
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader, such as `head`, is done; Python must not flush to it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def verb_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """The verb at the start of a command line, of one word or two (``study domain``), and the words after it.

    Raises:
        SystemExit: there is no such verb.
    """
    if " ".join(words[:2]) in VERBS:
        return " ".join(words[:2]), list(words[2:])
    verb, second = words[0], words[1] if len(words) > 1 else ""
    subverbs = [name.partition(" ")[2] for name in VERBS if name.startswith(f"{verb} ")]
    # A word after `study` is a run's folder, unless it is nearly one of its own verbs.
    typo = [] if Path(second).exists() else get_close_matches(second, subverbs, n=1)
    if verb in VERBS and not typo:
        return verb, list(words[1:])
    wrong = " ".join(words[:2]) if typo else verb
    close = [f"{verb} {typo[0]}"] if typo else get_close_matches(verb, VERBS, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(VERBS)}."
    sys.stderr.write(f"{wrong!r} is not a verb of ssl-pipeline. {hint}\n")
    raise SystemExit(2)


def _help(verb: str, words: Sequence[str]) -> str:
    """What a verb takes; its module is not imported, so that this is quick."""
    from ssl_pipeline.config.help import has_yaml, help_of
    from ssl_pipeline.config.options import parser

    if not has_yaml(verb):
        return parser(verb).format_help()
    given = dict(pairwise(words)).get("--config-dir")
    return help_of(verb, VERBS[verb][1], words, Path(given).expanduser() if given else None)


def _overview() -> str:
    lines = [f"  {name:<20} {text}" for name, (_, text) in VERBS.items()]
    usage = "usage: ssl-pipeline VERB …   (ssl-pipeline VERB --help tells more, ssl-pipeline --version the version)"
    return "\n".join([usage, "", *lines, ""])


if __name__ == "__main__":
    main()
