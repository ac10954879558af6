"""The jobs of a study, and its processes: one for each GPU, or one of one thread for each core.

Every cell is a file, so that a study that was stopped does only what is missing. Features are extracted once for an encoder.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, UserError
from ssl_pipeline.config.files import atomic_write
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.downstream.labels import draw_index
from ssl_pipeline.downstream.plan import Plan, selection
from ssl_pipeline.downstream.pooled_task import PooledConfig, Rows, targets_of
from ssl_pipeline.downstream.regime import CachedFeatures
from ssl_pipeline.engine.distributed import dist_info, move_to_device, start_accelerator
from ssl_pipeline.evaluation.features import extract_readable
from ssl_pipeline.finetune import model_card
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.logging.progress import console
from ssl_pipeline.logging.run import write_json
from ssl_pipeline.metrics.knn import knn_accuracy
from ssl_pipeline.models.encoder import finite, save
from ssl_pipeline.study.cells import Cell, Opener, changes, slug
from ssl_pipeline.transforms.preprocessing import Preprocessing

_FEATURES_FORM = 2  # of the files of features: those of another number are extracted anew
_runner: list[CellRunner] = []  # of a worker process


@dataclass
class FeatureJob:
    """Features to be extracted into a file, by the encoder that a cell starts from, of the training images of a sorted index.

    With ``knn`` all of them are read, and the kNN accuracy is measured.
    """

    cell: Cell
    index: Tensor
    knn: bool
    file: Path


@dataclass(frozen=True)
class TrainJob:
    """A cell to be trained, from a file of its encoder's features where it reads them.

    The metrics and ``facts`` go to the file ``record``, and the model to a folder, where it is kept.
    """

    cell: Cell
    features: Path | None
    record: Path
    facts: dict[str, Any]
    model: Path | None


class CellRunner:
    """What works on a study's jobs, one in each process."""

    def __init__(self) -> None:
        self.accelerator, self.opener = start_accelerator(), Opener()
        self.share = dist_info(self.accelerator)

    def run(self, job: FeatureJob | TrainJob) -> str:
        if isinstance(job, FeatureJob):
            self.read(job)
            return f"features of {next(iter(job.cell.row.values()))}"
        name, value = next(iter(self.train(job).items()))
        return f"{job.cell}: {name} {value:.4f}"

    def read(self, job: FeatureJob) -> None:
        """Extracts features of training images and of those to measure on, and writes them whole or not at all."""
        config = job.cell.config
        (pool, held_out), start = self.opener.sources(config), self.opener.start(config)
        assert held_out is not None
        encoder = move_to_device(start.new_encoder(config.seed), self.share)
        preprocessing = Preprocessing.of(start.spec)
        index = torch.arange(len(pool)) if job.knn else job.index
        found = {"index": index}
        for name, source, asked in (("train", pool, index), ("held_out", held_out, None)):
            found[name], found[f"{name}_read"] = extract_readable(encoder, source, preprocessing, self.share, asked)
        if job.knn and pool.labels is not None and held_out.labels is not None:
            bank, wanted = pool.labels[found["train_read"]], held_out.labels[found["held_out_read"]]
            accuracy = knn_accuracy(found["held_out"], wanted, found["train"], bank, len(pool.classes or ()))
            if math.isfinite(accuracy):
                write_json(job.file.with_suffix(".json"), {"knn": accuracy})
        with atomic_write(job.file) as temporary:
            save_file(found, temporary)

    def train(self, job: TrainJob) -> dict[str, float]:
        """Trains and measures a cell as ``finetune`` does, and writes its metrics, the model first."""
        began, cell = time.perf_counter(), job.cell
        config, plan = self.opener.plan(cell.config)
        features = None if job.features is None else cached_features(load_file(job.features), config, plan)
        context = plan.context(cell.seed, self.accelerator, features=features)
        task = plan.train(context)
        metrics = finite(plan.measure(task, context))
        if job.model is not None:
            job.model.mkdir(parents=True, exist_ok=True)
            save(job.model, task, model_card(config, plan, metrics))
        chosen_by = selection(config.labels, config.downstream, config.regime, context.labeled)
        held_out = chosen_by["held_out"]
        record = {
            **cell.row, "label_count": chosen_by["learned_from"] + held_out, "held_out": held_out, "seed": cell.seed,
            "split": config.split, "figures": metrics, "seconds": round(time.perf_counter() - began, 2), **job.facts,
        }  # fmt: skip
        write_json(job.record, record)
        return metrics


def cached_features(found: Mapping[str, Tensor], config: FinetuneConfig, plan: Plan) -> CachedFeatures:
    """A file of features as a plan reads them."""
    index, validation = draw_index(config.labels, config.downstream, plan.pool, config.seed)
    measured = Rows(found["held_out"], targets_of(plan.held_out)[found["held_out_read"]], found["held_out_read"])
    chosen = None if validation is None else rows_of(found, validation, plan.pool)
    return CachedFeatures(rows_of(found, index, plan.pool), chosen, measured)


def rows_of(found: Mapping[str, Tensor], index: Tensor, pool: IndexedDataset) -> Rows:
    """Some training images (sorted int64 indices) as a head reads them, without those that could not be decoded."""
    assert bool(torch.isin(index, found["index"]).all())
    chosen = torch.isin(found["train_read"], index)
    read = found["train_read"][chosen]
    return Rows(found["train"][chosen], targets_of(pool)[read], torch.searchsorted(index, read))


def train_cells(
    cells: Sequence[Cell],
    folder: Path,
    opener: Opener,
    jobs: int | None,
    models: Collection[str] = (),
    knn: Collection[str] = (),
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Does what is missing of a study, by so many ``jobs`` at a time; None takes one for each GPU, or core.

    ``models`` and ``knn`` name the cells whose models are kept (in ``models/``, by condition), and whose encoder's kNN accuracy is
    measured.

    Returns:
        The cells' records, in their order, and the kNN accuracies by cell.

    Raises:
        ConfigError: a cell is there that was made by other settings, weights or data.
    """
    for name in ("cells", "features", "models"):
        (folder / name).mkdir(exist_ok=True)
    readings, trainings, measured = _plan(cells, folder, opener, models, knn)
    console().print(f"{len(cells)} cells, {len(cells) - len(trainings)} of them done before", markup=False)
    trainings.sort(key=_rank)  # the longest first, so that at the end no process waits long for another
    for work, total in ((readings, len(readings)), (trainings, len(cells))):
        done = run_jobs(work, num_jobs(jobs, len(work))) if work else ()
        for place, text in enumerate(done, total - len(work) + 1):
            console().print(f"  {place}/{total}  {text}", markup=False, highlight=False)
    rows = [json.loads((folder / "cells" / f"{cell.name}.json").read_text(encoding="utf-8")) for cell in cells]
    found = {
        name: json.loads(file.read_text(encoding="utf-8"))["knn"] for name, file in measured.items() if file.exists()
    }
    return rows, found


def _plan(
    cells: Sequence[Cell], folder: Path, opener: Opener, models: Collection[str], knn: Collection[str]
) -> tuple[list[FeatureJob], list[TrainJob], dict[str, Path]]:
    """What is missing: features to extract, cells to train; and where each kNN accuracy will be, by cell."""
    wanted, trainings, measured = dict[Path, FeatureJob](), list[TrainJob](), dict[str, Path]()
    problems = list[str]()
    for cell in cells:
        facts, record = opener.facts(cell), folder / "cells" / f"{cell.name}.json"
        reads = (
            isinstance(cell.config.downstream, PooledConfig) and cell.config.regime.probes and not cell.config.domain
        )
        features = _features_file(folder, cell, facts) if reads else None
        done, asks = record.exists(), cell.name in knn
        if done:
            before = json.loads(record.read_text(encoding="utf-8"))
            problems += [f"{record}: {text}" for text in changes({key: before.get(key) for key in facts}, facts)[:3]]
        if features is not None and (not done or asks):
            job = wanted.setdefault(features, FeatureJob(cell, torch.empty(0, dtype=torch.int64), False, features))
            drawn = draw_index(cell.config.labels, cell.config.downstream, opener.sources(cell.config)[0], cell.seed)
            job.index = torch.cat([job.index, *(part for part in drawn if part is not None)]).unique()
            job.knn |= asks and not features.with_suffix(".json").exists()
            if asks:
                measured[cell.name] = features.with_suffix(".json")
        if not done:
            model = folder / "models" / cell.condition if cell.name in models else None
            trainings.append(TrainJob(cell, features, record, facts, model))
    if problems:
        raise ConfigError([
            *problems, f"{str(folder)!r} can only be completed as it was started: undo these, or choose another `output=FOLDER`.",
        ])  # fmt: skip
    return [job for job in wanted.values() if job.knn or not _holds(job.file, job.index)], trainings, measured


def _rank(job: TrainJob) -> tuple[bool, bool, float]:
    labels = job.cell.config.labels
    share = 1.0 if labels.fraction is None else labels.fraction
    counted = labels.per_class is not None
    return not job.cell.config.regime.trains_all, counted, -(labels.per_class or share)


def _holds(features: Path, index: Tensor) -> bool:
    """Whether a file has the features of these training images: an earlier part of the study may have drawn fewer."""
    if not features.exists():
        return False
    with safe_open(features, "pt") as file:
        return bool(torch.isin(index, file.get_tensor("index")).all())


def _features_file(folder: Path, cell: Cell, facts: Mapping[str, Any]) -> Path:
    """Where an encoder's features are; the name changes with all that decides them."""
    settings = facts["settings"]
    keys = ("size", "data", "split", "backbone", "neck", "transform")
    parts = [_FEATURES_FORM, facts["weights"], facts["data"], *(settings[key] for key in keys)]
    parts += [cell.seed] if cell.config.starts_fresh else []
    digest = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=6).hexdigest()
    return folder / "features" / f"{slug(str(next(iter(cell.row.values()))))}_{digest}.safetensors"


def num_jobs(asked: int | None, pieces: int) -> int:
    """As many processes as were asked for, or as there are GPUs, or cores; never more than pieces of work."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(asked or torch.cuda.device_count() or cores, pieces))


def run_jobs(work: Sequence[FeatureJob | TrainJob], processes: int) -> Iterator[str]:
    """Runs all jobs, and yields a line about each as soon as it is done."""
    if processes == 1:
        yield from map(CellRunner().run, work)
        return
    # Spawned: a forked process inherits locks of torch's threads, and can't use CUDA.
    context = multiprocessing.get_context("spawn")
    devices: Any = context.Queue()
    for place in range(processes):
        devices.put(place)
    with ProcessPoolExecutor(processes, context, _begin, (devices,)) as pool:
        try:
            with _deaf_to_interrupts():
                coming = [pool.submit(_run, piece) for piece in work]
            for done in as_completed(coming):
                yield done.result()
        except BrokenProcessPool:
            raise ConfigError(
                "a process of the study was killed, most likely for want of memory: start the same command again, which does what "
                "is missing, with fewer `jobs`."
            ) from None
        except UserError as error:
            raise ConfigError(str(error).split("\n")) from error
        except (KeyboardInterrupt, GeneratorExit):  # what they are at is not kept, so that nothing is worth waiting for
            for worker in multiprocessing.active_children():
                worker.kill()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started in here never hear a terminal's Ctrl-C: it is the study's, which ends them.

    The mask is what they inherit. It does not keep the study itself from being interrupted amid a start, which would leave a
    child without the rest of its message: the kernel hands the signal to any thread of ours, and Python's handler runs in the
    main one whatever its mask. So the handler waits too.
    """
    main = threading.current_thread() is threading.main_thread()
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number)) if main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if main:
            signal.signal(signal.SIGINT, handler)
            if came:
                signal.raise_signal(signal.SIGINT)


def _begin(devices: Any) -> None:
    """A worker's start: its device, one thread, and an end when the study itself is killed."""
    place = devices.get()
    if torch.cuda.device_count() > 1:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = shown.split(",") if shown else [str(i) for i in range(torch.cuda.device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[place % len(names)]
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(piece: FeatureJob | TrainJob) -> str:
    if not _runner:
        _runner.append(CellRunner())
    return _runner[0].run(piece)
