"""``ssl-pipeline VERB``: one command for everything; each verb is a module's ``main``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches

VERBS = {
    "prepare": (
        "ssl_pipeline.data.prepare",
        "reads a folder of images once: what is wrong with which, and fast starts",
    ),
    "pretrain": ("ssl_pipeline.pretrain", "stage one: a backbone from images without labels"),
    "finetune": ("ssl_pipeline.finetune", "stage two: a model from the backbone and a few labels"),
    "evaluate": (
        "ssl_pipeline.evaluate.command",
        "how good are an encoder's features? kNN, probe, few labels, corruptions",
    ),
    "study": ("ssl_pipeline.study.label_efficiency", "did pretraining help? stage two under several conditions"),
    "study domain": (
        "ssl_pipeline.study.domain",
        "which method helps across domains? each on each shift, in one table",
    ),
    "study leave_one_out": (
        "ssl_pipeline.study.leave_one_out",
        "which method generalizes? each domain left out once, the worst beside the mean",
    ),
    "study open_set": (
        "ssl_pipeline.study.open_set",
        "how well are classes that were never taught found? over draws of the known ones",
    ),
    "predict": ("ssl_pipeline.deliver.predict", "classes and probabilities for image files"),
    "embed": ("ssl_pipeline.deliver.embed", "a data set's features as Parquet or npz, with ids"),
    "neighbours": ("ssl_pipeline.deliver.neighbours", "the images most alike to one, as a list and a picture"),
    "export": (
        "ssl_pipeline.deliver.export",
        "an encoder or a model for other tools: torchvision, timm, ONNX, the Hub, …",
    ),
    "views": ("ssl_pipeline.views.picture", "a picture of the random views of a data set"),
    "temperature": ("ssl_pipeline.study.temperature", "a picture of what the temperature does, in a run of yours, too"),
    "report": ("ssl_pipeline.report.command", "one page that shows what runs learned: curves, images, tables"),
    "dashboard": ("ssl_pipeline.track.dashboard", "a W&B workspace for a project: curves, pictures, stage two"),
    "bench": ("ssl_pipeline.bench.command", "the measurements that README quotes"),
}


def main() -> None:
    """The command line's entry."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("--help", "-h", "help"):
        lines = [f"  {name:<20} {text}" for name, (_, text) in VERBS.items()]
        sys.stdout.write(
            "\n".join(["usage: ssl-pipeline VERB …   (ssl-pipeline VERB --help tells more)", "", *lines, ""])
        )
        return
    if verb not in VERBS:
        close = get_close_matches(verb, VERBS, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(VERBS)}."
        sys.stderr.write(f"{verb!r} is not a verb of ssl-pipeline. {hint}\n")
        raise SystemExit(2)
    del sys.argv[1]
    if " ".join([verb, *sys.argv[1:2]]) in VERBS:  # of two words, such as `study domain`
        verb = f"{verb} {sys.argv.pop(1)}"
    run: Callable[[], None] = importlib.import_module(VERBS[verb][0]).main
    try:
        run()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; Python must not flush to it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
