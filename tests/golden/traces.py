"""Traces of tiny runs, to show that a refactoring keeps every number bit for bit.

    python -m tests.golden.traces record FILE.json     # at the commit before
    python -m tests.golden.traces check FILE.json      # at the commit after; exit code 1 and a list where a trace differs

Both commits must run on the same machine, with the same versions of torch and its kin: another processor gives other last bits.
For that reason no recorded file is part of the repository.

A trace holds no name of the code that made it. It has the values of each line of ``metrics.jsonl``, digests of the saved weights,
the table of a study, and of a source of images a digest of the pixels that reach the network. Metrics, modules, classes and
state dict keys may be renamed, and two recordings still compare. Only configuration keys are spelled out, all of them in the tables
below: whoever renames a key edits them, and leaves the names of the traces (the keys of ``TRACES``) alone.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# ---- Words of the command line ---------------------------------------------------------------------------------------
# `<NAME>` is a folder or file of `fixtures`, or the run of the trace of that name; `{}` is the trace's own folder, which every
# command writes to, and which is told to it at the end where its words do not have it.

METRICS = "metrics.jsonl"
UNSTEADY = re.compile(r"time|second|wait|per_s|memory|system/")  # names of metrics that no two runs share
OUTPUT = "output={}"
TABLES = ("study", "evaluate")  # verbs whose figures are in a JSON file and in a printed table

QUIET = ["tracking=off"]
PRETRAIN = [
    *QUIET, "tracking.log_images=false", "transform.size=12", "backbone.width=4", "batch_size=32", "log_every=1", "num_workers=0",
    "evaluate_every=0 steps",
]  # fmt: skip
HEADS = ["pretext.hidden_width=32", "pretext.projection_width=16"]
TEN = [*PRETRAIN, "data.val=4000", "steps=10"]
SIMCLR = [*TEN, *HEADS, "pretext=simclr"]
SOURCE = [*PRETRAIN, *HEADS, "steps=3"]
LABELED_SOURCE = [*SOURCE, "pretext=supcon"]  # its loss reads the labels
LOCAL_VIEWS = ["transform.local_views.count=2", "transform.local_views.size=8"]

FINETUNE = [*QUIET, "tracking.log_images=false", "num_workers=0"]
CLASSIFY = [*FINETUNE, "data.val=4000", "split=val", "labels.per_class=5", "encoder=<pretext/simclr>"]
LENGTH = ["regime.length=10 steps", "regime.min_steps=0"]
PROBE = ["regime.probe.length=4 steps", "regime.probe.min_steps=0"]
DENSE = [*FINETUNE, "regime=lp_ft", "regime.length=4 steps", "regime.min_steps=0", "regime.batch_size=8", *PROBE]
ACROSS = [
    *FINETUNE, "data=fashion_domains", "domain.source=[original]", "domain.target=[edges]", "backbone.width=4", "size=12",
    "regime=scratch", "regime.length=6 steps", "regime.min_steps=0", "labels.per_class=5", "data.val=4000", "split=val",
]  # fmt: skip

PRETEXT: dict[str, list[str]] = {
    "barlow_twins": HEADS,
    "byol": [*HEADS, "pretext.predictor_width=32"],
    "dcl": HEADS,
    "dclw": HEADS,
    "dino": [
        "pretext.hidden_width=32", "pretext.bottleneck_width=16", "pretext.prototypes=10",
        "pretext.freeze_prototypes=2 steps", *LOCAL_VIEWS,
    ],
    "instance_discrimination": HEADS,
    "moco_v2": [*HEADS, "pretext.queue=48", "pretext.batch_norm_group=16"],
    "moco_v3": [*HEADS, "pretext.predictor_width=32"],
    "nnclr": [*HEADS, "pretext.predictor_width=32", "pretext.queue=48"],
    "rotation": [],
    "simclr": HEADS,
    "simsiam": [*HEADS, "pretext.predictor_width=32"],
    "supcon": HEADS,
    "swav": [
        *HEADS, "pretext.prototypes=10", "pretext.queue=64", "pretext.queue_start=4 steps", "pretext.freeze_prototypes=2 steps",
        *LOCAL_VIEWS,
    ],
    "vicreg": HEADS,
}  # fmt: skip

DOMAIN = [
    "adabn", "coral", "coral_over_sources", "dance", "dann", "erm", "exemplar_memory", "information_maximization", "mcc",
    "mixstyle", "mmd", "source_only", "weight_averaging",
]  # fmt: skip
DOMAIN_EXTRA = {
    "coral_over_sources": ["domain.source=[original,textured]"],
    "weight_averaging": ["domain.start=2 steps"],
}

TRACES: dict[str, list[str]] = {
    **{f"pretext/{name}": ["pretrain", *TEN, f"pretext={name}", *words] for name, words in PRETEXT.items()},
    # Stage one's other ways.
    "pretrain/micro_batches": ["pretrain", *SIMCLR, "micro_batch_size=8"],
    "pretrain/learned_temperature": ["pretrain", *SIMCLR, "pretext.temperature.learned.min=0.05"],
    "pretrain/domain_temperature": [
        "pretrain", *SIMCLR, "data=fashion_domains", "pretext.temperature.other_domain=1.0",
    ],
    "pretrain/restyle": ["pretrain", *SIMCLR, "data=fashion_domains", "transform.amplitude_mix.probability=0.5", "transform.amplitude_mix.styles=64"],
    "pretrain/jitter_and_blur": [
        "pretrain", *LABELED_SOURCE, "data=folder", "data.path=<photos>", "transform=byol", "transform.size=12", "transform.rotation.probability=0.5",
        "transform.erasing.probability=0.5",
    ],
    # Stage two.
    "regime/frozen": ["finetune", *CLASSIFY, "regime=frozen"],
    "regime/lp_ft": ["finetune", *CLASSIFY, "regime=lp_ft", *LENGTH],
    "regime/end_to_end": ["finetune", *CLASSIFY, "regime=end_to_end", *LENGTH],
    "regime/scratch": ["finetune", *CLASSIFY, "regime=scratch", *LENGTH, "seeds=2"],
    "regime/held_out": ["finetune", *CLASSIFY, "regime=lp_ft", *LENGTH, "labels.validation=0.2"],
    "regime/consistency": ["finetune", *CLASSIFY, "regime=lp_ft", *LENGTH, "unlabeled=consistency"],
    "downstream/multi_label": [
        "finetune", *FINETUNE, "data=table", "data.path=<table>", "downstream=multi_label", "data.target_columns=[square,circle]",
        "encoder=<source/table>", "regime=lp_ft", *LENGTH,
    ],
    "downstream/regression": [
        "finetune", *FINETUNE, "data=table", "data.path=<table>", "downstream=regression", "data.target_columns=[red]",
        "encoder=<source/table>", "regime=end_to_end", *LENGTH,
    ],
    "downstream/retrieval": ["finetune", *CLASSIFY, "downstream=retrieval", "regime=frozen"],
    "downstream/segmentation": [
        "finetune", *DENSE, "data=mask_folder", "data.path=<masks>", "downstream=segmentation", "size=32",
        "encoder=<source/mask_folder>",
    ],
    "downstream/detection": [
        "finetune", *DENSE, "data=coco", "data.path=<boxes>", "downstream=detection", "downstream.width=16", "downstream.hidden=32",
        "downstream.rpn_post_nms_top_n=50", "downstream.box_batch_size_per_image=32", "size=48", "encoder=<source/coco>",
    ],
    **{f"domain/{name}": ["finetune", *ACROSS, f"domain={name}", *DOMAIN_EXTRA.get(name, [])] for name in DOMAIN},
    "domain/shot_im": ["finetune", *ACROSS, "domain=shot_im", "domain.adaptation.length=4 steps"],
    # Sources of images.
    "source/embedded": ["pretrain", *LABELED_SOURCE, "data=embedded", "data.val=4000"],
    "source/fashion_domains": ["pretrain", *LABELED_SOURCE, "data=fashion_domains", "data.val=4000"],
    "source/fashion_mnist": ["pretrain", *LABELED_SOURCE, "data=fashion_mnist", "data.path=<fashion>", "data.val=4000"],
    "source/folder": ["pretrain", *LABELED_SOURCE, "data=folder", "data.path=<photos>"],
    "source/domain_folder": [
        "pretrain", *SIMCLR, "steps=3", "data=domain_folder", "data.path=<domains>", "data.val=0.1", "pretext.temperature.other_domain=1.0",
    ],
    "source/table": ["pretrain", *SOURCE, "data=table", "data.path=<table>"],
    "source/mask_folder": ["pretrain", *SOURCE, "data=mask_folder", "data.path=<masks>"],
    "source/coco": ["pretrain", *SOURCE, "data=coco", "data.path=<boxes>"],
    "source/torchvision": [
        "pretrain", *LABELED_SOURCE, "data=torchvision", "data.dataset=FashionMNIST", "data.path=<torchvision>", "data.val=0.4",
    ],
    "source/torchvision_files": ["pretrain", *LABELED_SOURCE, "data=torchvision", "data.dataset=EuroSAT", "data.path=<torchvision>"],
    "source/webdataset": ["pretrain", *LABELED_SOURCE, "data=webdataset", "data.path=<shards>", "data.classes=[even,odd]"],
    "source/huggingface": ["pretrain", *LABELED_SOURCE, "data=huggingface", "data.path=<parquet>"],
    "source/huggingface_stream": [
        "pretrain", *LABELED_SOURCE, "data=huggingface", "data.path=<parquet>", "data.streaming=true", "data.length=80",
    ],
    # What reads finished runs.
    "evaluate": [
        "evaluate", "<pretext/simclr>", "data=embedded", "split=val", "data.val=4000", "corrupted=100", "probe.epochs=2", "few_shot.seeds=2",
        "images=500", "output={}/evaluation.json",
    ],
    "study": [
        "study", "<pretext/simclr>", "labels=[2]", "seeds=2", "regimes=[frozen,lp_ft]", "jobs=1", "knn=true",
        "overrides.lp_ft=['regime.length=2 steps']", "overrides.scratch=['regime.length=2 steps']", OUTPUT, "--", "data=embedded",
        "data.val=4000", "split=val", "regime.min_steps=0",
    ],
}  # fmt: skip

# ---- What a trace is -------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """What is kept of a run.

    Attributes:
        steps: a line of metrics each: its names, for people alone, and its values, floats in hexadecimal.
        weights: a digest of each file of weights, sorted.
        table: the figures of a study or an evaluation, and those of the tables that it prints.
        pixels: a digest of all images that reached the network, in any order; of sources alone.
    """

    steps: list[dict[str, list[str]]]
    weights: list[str] = field(default_factory=list)
    table: list[str] = field(default_factory=list)
    pixels: str = ""


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """In words, where two traces differ; the first line of metrics that does stands for those after it."""
    told = []
    before, after = recorded["steps"], found["steps"]
    for number, (one, other) in enumerate(zip(before, after, strict=False), 1):
        if one["values"] != other["values"]:
            told.append(f"line {number} of {METRICS}: {_first(one, other)}")
            break
    else:
        if len(before) != len(after):
            told.append(f"{len(before)} lines of {METRICS} recorded, {len(after)} found")
    told += [f"the {part} differ" for part in ("weights", "table", "pixels") if recorded[part] != found[part]]
    return told


def _first(recorded: Mapping[str, list[str]], found: Mapping[str, list[str]]) -> str:
    if len(recorded["values"]) != len(found["values"]):
        return f"recorded {', '.join(recorded['names'])}; found {', '.join(found['names'])}"
    for name, one, other in zip(recorded["names"], recorded["values"], found["values"], strict=True):
        if one != other:
            return f"{name} was {_readable(one)} ({one}) and is {_readable(other)} ({other})"
    raise AssertionError("equal lines")


def _readable(text: str) -> str:
    return f"{float.fromhex(text):.9g}" if text.startswith(("0x", "-0x")) else text


def exact(value: object) -> str:
    """A number without loss, as text."""
    return value.hex() if isinstance(value, float) else str(value)


def metrics_of(run: Path) -> list[dict[str, list[str]]]:
    """The lines of a run's metrics without what no two runs share."""
    lines = []
    for text in (run / METRICS).read_text(encoding="utf-8").splitlines():
        kept = {name: value for name, value in json.loads(text).items() if not UNSTEADY.search(name)}
        lines.append({"names": list(kept), "values": [exact(value) for value in kept.values()]})
    return lines


def weights_of(run: Path) -> list[str]:
    """Of each file of weights a digest that knows neither the file's name nor its tensors' names and order."""
    from safetensors.torch import load_file

    return sorted(_digest(map(_tensor_digest, load_file(file).values())) for file in run.rglob("*.safetensors"))


def _tensor_digest(tensor: Any) -> str:
    tensor = tensor.detach().cpu().contiguous()
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(head + tensor.flatten().numpy().tobytes()).hexdigest()


def _digest(parts: Iterator[str]) -> str:
    return hashlib.sha256("".join(sorted(parts)).encode()).hexdigest()


def numbers_of(folder: Path, printed: str) -> list[str]:
    """The numbers in the JSON files of a folder, and in the rows of the tables that were printed."""
    numbers: list[str] = []

    def walk(tree: object, name: str = "") -> None:
        if isinstance(tree, dict):
            for key, value in tree.items():
                walk(value, str(key))
        elif isinstance(tree, list):
            for value in tree:
                walk(value, name)
        elif isinstance(tree, float) and not UNSTEADY.search(name):
            numbers.append(exact(tree))

    for file in sorted(folder.glob("*.json")):
        walk(json.loads(file.read_text(encoding="utf-8")))
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    return numbers + [number for row in rows for number in re.findall(r"[-+]?\d+\.\d+", row)]


@contextlib.contextmanager
def images_seen() -> Iterator[set[str]]:
    """Digests of the images that reach a network, which are what a convolution of one or three channels is given."""
    from torch import nn
    from torch.nn.modules.module import register_module_forward_pre_hook

    seen: set[str] = set()

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Conv2d) and module.in_channels in (1, 3):
            seen.update(_tensor_digest(image) for image in inputs[0])

    handle = register_module_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


# ---- Runs ------------------------------------------------------------------------------------------------------------


def fixtures(root: Path) -> dict[str, Callable[[], Path]]:
    """Makes the images that the traces need, those that are asked for."""
    from tests import pictures, shapes, shards

    def domains() -> Path:
        for name in ("photo", "sketch"):
            pictures.color_folder(root / "domains" / name)
        return root / "domains"

    def parquet() -> Path:
        from tests.unit.test_source_huggingface import table, write_parquet

        return write_parquet(root / "parquet", table(80), shards=2)

    def shard_files() -> Path:
        shards.write_shards(root / "shards", [30, 20, 30])
        return root / "shards"

    def fashion() -> Path:
        import ssl_pipeline

        return next(Path(ssl_pipeline.__file__).parent.rglob("train-images*.gz")).parent

    def torchvision() -> Path:
        raw = root / "torchvision" / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for file in fashion().glob("*.gz"):
            (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        pictures.color_folder(root / "torchvision" / "eurosat" / "2750")
        return root / "torchvision"

    return {
        "photos": lambda: pictures.color_folder(root / "photos"),
        "domains": domains,
        "table": lambda: shapes.number_table(root / "table", 60),
        "masks": lambda: shapes.mask_folder(root / "masks", 60),
        "boxes": lambda: shapes.box_folder(root / "boxes", 60, height=48, width=48) / "annotations.json",
        "shards": shard_files,
        "parquet": parquet,
        "fashion": fashion,
        "torchvision": torchvision,
    }


class RefusedError(Exception):
    """A trace's command was refused, such as for a key that has another name now."""


class Runner:
    """Runs traces in a folder; fixtures, and the runs that others start from, are made once.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._fixtures, self._places = fixtures(root), dict[str, Path]()
        self._traces: dict[str, Trace] = {}

    def trace(self, name: str) -> Trace:
        if name not in self._traces:
            self._traces[name] = self._run(name)
        return self._traces[name]

    def _place(self, name: str) -> str:
        if name in TRACES:
            self.trace(name)
        elif name not in self._places:
            self._places[name] = self._fixtures[name]()
        return str(self._places[name])

    def _run(self, name: str) -> Trace:
        verb, *words = TRACES[name]
        folder = self.root / "runs" / name.replace("/", "-")
        words = [re.sub(r"<(.+)>", lambda found: self._place(found[1]), word) for word in words]
        if not any("{}" in word for word in words):
            words.append(OUTPUT)
        elif OUTPUT not in words:  # a file in it
            folder.mkdir(parents=True)
        self._places[name] = folder
        with images_seen() as images:
            printed = command(verb, *(word.replace("{}", str(folder)) for word in words))
        return Trace(
            steps=metrics_of(folder) if (folder / METRICS).exists() else [],
            weights=weights_of(folder),
            table=numbers_of(folder, printed) if verb in TABLES else [],
            pixels=_digest(iter(images)) if name.startswith("source/") else "",
        )


def command(*words: str) -> str:
    """Runs ``ssl-pipeline`` in this process, and returns what it printed.

    Raises:
        RefusedError: when it leaves with an exit code; what it printed is on stderr.
    """
    from ssl_pipeline.cli import main as cli

    before, printed = sys.argv, io.StringIO()
    sys.argv = ["ssl-pipeline", *words]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            cli()
    except BaseException as error:
        sys.stderr.write(f"{printed.getvalue()}\nfailed: ssl-pipeline {' '.join(words)}\n")
        if isinstance(error, SystemExit):
            raise RefusedError("a command that it needs was refused: see above") from None
        raise
    finally:
        sys.argv = before
    return printed.getvalue()


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder of its own for all runs, which are on one thread and keep nothing outside it."""
    root = Path(tempfile.mkdtemp(prefix="traces-"))
    os.environ |= {
        "SSL_PIPELINE_CACHE": str(root / "cache"), "HF_DATASETS_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1", "COLUMNS": "200",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def machine() -> dict[str, str]:
    """What bits depend on beside the code."""
    import torch

    cpu = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpu.read_text(encoding="utf-8")) if cpu.exists() else []
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Records traces, or compares them with recorded ones; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.traces", description="Bit for bit the same numbers?")
    parser.add_argument("action", choices=["record", "check"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a trace or the start of its name")
    options = parser.parse_args(arguments)
    names = [name for name in TRACES if not options.only or name.startswith(tuple(options.only))]
    if not names:
        parser.error(f"no trace is named so; there are {', '.join(TRACES)}")
    say = sys.stdout.write
    recorded = json.loads(options.file.read_text(encoding="utf-8")) if options.action == "check" else {}
    if recorded and recorded["machine"] != machine():
        say(f"recorded on another machine, whose last bits may differ: {recorded['machine']}, and here {machine()}\n")
    wrong, found = 0, dict[str, Any]()
    with workplace() as root:
        runner = Runner(root)
        for name in names:
            start = time.monotonic()
            told: list[str] = []
            try:
                found[name] = vars(runner.trace(name))
            except RefusedError as error:  # the others are of interest all the same
                told = [str(error)]
            if options.action == "check" and not told:
                known = recorded["traces"].get(name)
                told = ["is not in the file: record it"] if known is None else differences(known, found[name])
            wrong += bool(told)
            say(f"{name:<34} {time.monotonic() - start:5.1f} s  {'; '.join(told) or 'done'}\n")
            sys.stdout.flush()
    if options.action == "record":
        text = json.dumps({"machine": machine(), "traces": found}, indent=1)
        options.file.write_text(text + "\n", encoding="utf-8")
        say(f"wrote {len(found)} traces to {options.file}\n")
        return int(wrong > 0)
    gone = [name for name in recorded["traces"] if name not in TRACES]
    for name in gone:
        say(f"{name:<34} is recorded, and no longer in TRACES\n")
    say(f"{len(names) - wrong} of {len(names)} traces are the same, bit for bit\n")
    return int(wrong > 0 or bool(gone))


if __name__ == "__main__":
    raise SystemExit(main())
