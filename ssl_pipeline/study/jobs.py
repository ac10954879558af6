"""What is missing of a study, and its processes: one for each GPU, or one of one thread for each core.

Every cell is a file, so that a study that was stopped does only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, UserError
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.downstream.labels import draw_index
from ssl_pipeline.downstream.pooled_task import PooledConfig
from ssl_pipeline.logging.progress import console
from ssl_pipeline.study.cells import Cell, Opener, changes, slug
from ssl_pipeline.study.runner import CellRunner, FeatureJob, TrainJob

_FEATURES_FORM = 2  # of the files of features: those of another number are extracted anew
_runner: list[CellRunner] = []  # of a worker process


def train_cells(
    cells: Sequence[Cell],
    folder: Path,
    opener: Opener,
    jobs: int | None,
    models: Collection[str] = (),
    knn: Collection[str] = (),
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Does what is missing of a study.

    Args:
        cells: in any order.
        folder: the study's.
        opener: what they were checked with.
        jobs: processes at a time; see :func:`num_jobs`.
        models: names of the cells whose models are kept, in ``models/`` by the names of their conditions.
        knn: names of the cells whose encoder's kNN accuracy is measured.

    Returns:
        The cells' records, in their order, and the kNN accuracies by cell.

    Raises:
        ConfigError: a cell is there that was made by other settings, weights or data.
    """
    for name in ("cells", "features", "models"):
        (folder / name).mkdir(exist_ok=True)
    readings, trainings, measured = _plan(cells, folder, opener, models, knn)
    console().print(f"{len(cells)} cells, {len(cells) - len(trainings)} of them done before", markup=False)
    _run_all(readings, jobs, len(readings))
    trainings.sort(key=_rank)  # the longest first, so that at the end no process waits long for another
    _run_all(trainings, jobs, len(cells))
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
            problems += _changed(record, facts)
        if features is not None and (not done or asks):
            missing = asks and not features.with_suffix(".json").exists()
            before = wanted.get(features)
            index = _drawn(cell, opener.sources(cell.config)[0])
            index = index if before is None else torch.cat([before.index, index]).unique()
            wanted[features] = FeatureJob(
                before.cell if before else cell, index, missing or (before is not None and before.knn), features
            )
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


def _drawn(cell: Cell, pool: IndexedDataset) -> Tensor:
    """The images that a cell learns from, and those held out of them, sorted."""
    train, held_out = draw_index(cell.config.labels, cell.config.downstream, pool, cell.seed)
    return train if held_out is None else torch.cat([train, held_out]).sort().values


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


def _changed(file: Path, facts: Mapping[str, Any]) -> list[str]:
    before = json.loads(file.read_text(encoding="utf-8"))
    return [f"{file}: {text}" for text in changes({key: before.get(key) for key in facts}, facts)[:3]]


def _run_all(work: Sequence[FeatureJob | TrainJob], jobs: int | None, total: int) -> None:
    done = run_jobs(work, num_jobs(jobs, len(work))) if work else ()
    for place, text in enumerate(done, total - len(work) + 1):
        console().print(f"  {place}/{total}  {text}", markup=False, highlight=False)


def num_jobs(asked: int | None, pieces: int) -> int:
    """How many processes: what was asked for, or as many as there are GPUs, or cores; never more than pieces of work."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(asked or torch.cuda.device_count() or cores, pieces))


def run_jobs(work: Sequence[FeatureJob | TrainJob], processes: int) -> Iterator[str]:
    """Runs all jobs, and yields a line about each as soon as it is done.

    Raises:
        ConfigError: a piece of work can't be done, or a process was killed.
    """
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
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(place)
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _visible(place: int) -> str:
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = shown.split(",") if shown else [str(i) for i in range(torch.cuda.device_count())]
    return names[place % len(names)]


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(piece: FeatureJob | TrainJob) -> str:
    if not _runner:
        _runner.append(CellRunner())
    return _runner[0].run(piece)
