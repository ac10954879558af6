"""The one loop of both stages. Read it from top to bottom: it does nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from ssl_pipeline.data.lanes import StreamLoader
from ssl_pipeline.data.loader import IndexedLoader
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.engine.distributed import all_gather_objects
from ssl_pipeline.engine.lost import guard_dataloader
from ssl_pipeline.engine.optim import OptimConfig
from ssl_pipeline.engine.signals import CutShortError, StoppedError
from ssl_pipeline.engine.task import Task
from ssl_pipeline.engine.training import Step, TrainState
from ssl_pipeline.logging.jsonl import full_name
from ssl_pipeline.schedules import TrainProgress


class Listener(Protocol):
    """Hears the figures of a step: a tracker, a progress bar."""

    def __call__(self, done: int, figures: Mapping[str, float], /) -> None:
        """``done`` steps are done."""


Evaluation = Callable[[TrainProgress], Mapping[str, float]]


def fit(
    task: Task,
    batches: IndexedLoader | StreamLoader,
    optim: OptimConfig,
    optimizer: Optimizer,
    accelerator: Accelerator,
    checkpoints: Checkpoints | None = None,
    resume: Mapping[str, Any] | None = None,
    evaluate: Evaluation | None = None,
    evaluate_every: int = 0,
    listeners: tuple[Listener, ...] = (),
    moved: Callable[[int], None] = lambda _: None,
    log_every: int = 1,
    prefix: str = "train",
    micro: int | None = None,
) -> None:
    """Trains a task in place.

    Args:
        task: on the accelerator's device already.
        batches: a pure function of the step.
        optim: gives the rate of each step.
        optimizer: of the task's parameters.
        accelerator: gives precision and processes.
        checkpoints: where to save, and how often.
        resume: a loaded checkpoint to continue from.
        evaluate: figures of the task as it is, given the clock; called on all processes.
        evaluate_every: steps between two evaluations; 0 for never. The last step is always evaluated then.
        listeners: hear the figures, on the main process.
        moved: hears how many steps are done, before the first one and at each.
        log_every: steps between two logs.
        prefix: group of the step's own figures.
        micro: samples that a process embeds at once; None for its whole share of the batch.

    Raises:
        NonFiniteError: the loss or gradient of any process is no finite number, and the step is not to be skipped.
        StoppedError: a signal came; the state after the step it came in is saved.
        LostProcessError: another process, or a worker, was killed or hangs.
        ConfigError: the GPU's memory is not enough.
    """
    training = TrainState(task, batches, optim, optimizer, accelerator, checkpoints, micro, resume)
    offset, pace = batches.offset, ThroughputMeter()
    start, total = training.done, batches.total_steps + offset
    if resume is not None and "cut_short" in resume and evaluate is not None:
        _tell(listeners, start, resume["cut_short"] | evaluate(batches.clock(start - 1 - offset)), accelerator)
        training.begin()
        pace.begin()
    pace.ask()
    moved(start)
    # Closed here: an exception that a notebook keeps would keep the workers, too.
    with closing(guard_dataloader(batches.from_step(start - offset), start, batches.workers)) as steps:
        for batch in steps:
            pace.come(len(batch.index) * accelerator.num_processes)
            done, step = batch.clock.taken + 1, training.step(batch)
            moved(done)
            figures: dict[str, float] = {}
            if done % log_every == 0 or done == total:
                figures |= _of_step(step, training, pace, batches, accelerator, prefix)
            looks = evaluate is not None and _due(done, total, evaluate_every)
            stops = step.signal != 0 and done < total
            saves = checkpoints is not None and (stops or checkpoints.due(done, total))
            if looks or saves or done == total:  # what one process saves, all will continue from
                training.bring_together()
            if looks and evaluate is not None:
                try:
                    figures |= evaluate(batch.clock)
                except CutShortError as cut:
                    if checkpoints is not None:
                        checkpoints.save(done, {**training.state(done), "cut_short": figures})
                        checkpoints.wait()
                    raise StoppedError(cut.number, done, total, saved=checkpoints is not None) from None
                training.begin()
                pace.begin()
            _tell(listeners, done, figures, accelerator)
            if checkpoints is not None and saves:
                checkpoints.save(done, training.state(done))
            if stops:
                if checkpoints is not None:
                    checkpoints.wait()
                raise StoppedError(step.signal, done, total, saved=saves)
            pace.ask()


class ThroughputMeter:
    """How fast the steps come, and for what share of the time their data was waited for."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Counts from now on: what came before was no training, or is told."""
        self._since, self._images, self._waited = time.perf_counter(), 0, 0.0

    def ask(self) -> None:
        """A batch is waited for."""
        self._asked = time.perf_counter()

    def come(self, images: int) -> None:
        """It is there."""
        self._waited += time.perf_counter() - self._asked
        self._images += images

    def read(self) -> tuple[float, float]:
        """Images a second, and the share of the time spent waiting, since it began; begins anew."""
        seconds, images, waited = time.perf_counter() - self._since, self._images, self._waited
        self.begin()
        return images / seconds, waited / seconds


def _of_step(
    step: Step,
    training: TrainState,
    pace: ThroughputMeter,
    batches: IndexedLoader | StreamLoader,
    accelerator: Accelerator,
    prefix: str,
) -> dict[str, float]:
    """A step's figures, under their full names; those of all processes where they differ."""
    images_per_s, waited = pace.read()
    loss, wait = _over_processes(accelerator, step.output.loss.detach().float(), waited, batches)
    batches.bear(batches.unreadable)
    epoch = (step.clock.step + 1) / step.clock.steps_per_epoch
    found = {"loss": loss, "lr": step.rate, "data_wait": wait, "epoch": epoch}
    found["images_per_s"] = images_per_s
    counts = {
        "bad_files": batches.unreadable, "nonfinite_steps": training.skipped, "skipped_steps": training.skipped_by_scaler,
    }  # fmt: skip
    found |= {name: count for name, count in counts.items() if count}
    metrics = step.output.metrics | (step.output.details() if step.output.details is not None else {})
    found |= {name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()}
    return {full_name(prefix, name): value for name, value in found.items()}


def _tell(listeners: tuple[Listener, ...], done: int, figures: Mapping[str, float], accelerator: Accelerator) -> None:
    if figures and accelerator.is_main_process:
        for listener in listeners:
            listener(done, figures)


def _over_processes(
    accelerator: Accelerator, loss: torch.Tensor, wait: float, batches: IndexedLoader | StreamLoader
) -> tuple[float, float]:
    """The mean loss and the mean share of time spent waiting for data; bad files are told where there are new ones."""
    mine = torch.stack([loss, loss.new_tensor(wait), loss.new_tensor(float(bool(batches.untold())))])
    mean_loss, mean_wait, new = accelerator.reduce(mine, reduction="mean").tolist()
    if new:
        batches.learn(all_gather_objects(accelerator, batches.untold()))
    return mean_loss, mean_wait


def _due(done: int, total: int, every: int) -> bool:
    """At each interval and at the end; an interval that ends just before the end is left to the end."""
    return every > 0 and (done == total or (done % every == 0 and total - done >= every / 2))
