"""The one loop of both stages: :func:`fit` takes a :class:`TrainState` through the steps of a loader."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from accelerate import Accelerator

from ssl_pipeline.data.loader import TrainLoader
from ssl_pipeline.engine.distributed import all_gather_objects
from ssl_pipeline.engine.failures import guard_dataloader
from ssl_pipeline.engine.signals import CutShortError, StoppedError
from ssl_pipeline.engine.train_state import Step, TrainState
from ssl_pipeline.logging.jsonl import full_name
from ssl_pipeline.schedules import TrainProgress


class Callback:
    """Hooks of :func:`fit`; by default they do nothing.

    Attributes:
        evaluate_every: steps between two calls of ``evaluate``; 0 for none. The last step is always evaluated then.
    """

    evaluate_every: int = 0

    def on_train_start(self, resume: Mapping[str, Any] | None) -> None:
        """Before the first step; ``resume`` is the checkpoint that the run continues from."""

    def on_step_end(self, done: int) -> None:
        """``done`` steps are done; also called before the first one."""

    def evaluate(self, progress: TrainProgress) -> Mapping[str, float]:
        """Metrics of the task as it is; called on all processes."""
        del progress
        return {}

    def on_log(self, done: int, metrics: Mapping[str, float]) -> None:
        """Metrics after ``done`` steps; called on the main process alone."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, under names of its own."""
        return {}


def fit(
    state: TrainState,
    loader: TrainLoader,
    callbacks: Sequence[Callback] = (),
    log_every: int = 1,
    prefix: str = "train",
) -> None:
    """Trains a task in place; every ``log_every`` steps metrics are logged, the step's own in the group ``prefix``.

    Raises:
        NonFiniteError: the loss or gradient of any process is not finite, and the step is not to be skipped.
        StoppedError: a signal came; the state after the step it came in is saved.
        LostProcessError: another process, or a worker, was killed or hangs.
        ConfigError: the GPU's memory is not enough, or the checkpoint does not fit.
    """
    for callback in callbacks:
        callback.on_train_start(state.resume)
    state.start(loader, lambda: {name: kept for callback in callbacks for name, kept in callback.state_dict().items()})
    offset, meter, accelerator = loader.offset, ThroughputMeter(), state.accelerator
    start, total = state.done, loader.total_steps + offset
    evaluators = [callback for callback in callbacks if callback.evaluate_every]
    if evaluators and state.resume is not None and "cut_short" in state.resume:
        metrics = _evaluated(evaluators, loader.clock(start - 1 - offset))
        _log(callbacks, start, state.resume["cut_short"] | metrics, accelerator)
        state.train_mode()
        meter.reset()
    meter.wait_start()
    for callback in callbacks:
        callback.on_step_end(start)
    # Closed here: an exception that a notebook keeps would keep the workers, too.
    with closing(guard_dataloader(loader.from_step(start - offset), start, loader.num_workers)) as batches:
        for batch in batches:
            meter.wait_end(len(batch.index) * accelerator.num_processes)
            done, step = batch.clock.taken + 1, state.step(batch)
            for callback in callbacks:
                callback.on_step_end(done)
            metrics = {}
            if done % log_every == 0 or done == total:
                metrics = _step_metrics(step, state, loader, meter, prefix)
            due = [callback for callback in evaluators if _due(done, total, callback.evaluate_every)]
            stops = step.signal != 0 and done < total
            saves = state.checkpoints is not None and (stops or state.checkpoints.due(done, total))
            if due or saves or done == total:  # what one process saves, all will continue from
                state.sync()
            if due:
                try:
                    metrics |= _evaluated(due, batch.clock)
                except CutShortError as cut:
                    state.save(done, wait=True, cut_short=metrics)
                    raise StoppedError(cut.number, done, total, saved=state.checkpoints is not None) from None
                state.train_mode()
                meter.reset()
            _log(callbacks, done, metrics, accelerator)
            if saves:
                state.save(done, wait=stops)
            if stops:
                raise StoppedError(step.signal, done, total, saved=saves)
            meter.wait_start()


def _due(done: int, total: int, every: int) -> bool:
    """At each interval and at the end; an interval that ends just before the end is left to the end."""
    return every > 0 and (done == total or (done % every == 0 and total - done >= every / 2))


def _evaluated(callbacks: Sequence[Callback], progress: TrainProgress) -> dict[str, float]:
    return {name: value for callback in callbacks for name, value in callback.evaluate(progress).items()}


def _log(callbacks: Sequence[Callback], done: int, metrics: Mapping[str, float], accelerator: Accelerator) -> None:
    if metrics and accelerator.is_main_process:
        for callback in callbacks:
            callback.on_log(done, metrics)


def _step_metrics(
    step: Step, state: TrainState, loader: TrainLoader, meter: ThroughputMeter, prefix: str
) -> dict[str, float]:
    """A step's metrics under their full names; means over all processes where they differ."""
    images_per_s, waited = meter.compute()
    loss = step.output.loss.detach().float()
    mine = torch.stack([loss, loss.new_tensor(waited), loss.new_tensor(float(bool(loader.new_errors())))])
    mean_loss, mean_wait, new_bad_files = state.accelerator.reduce(mine, reduction="mean").tolist()
    if new_bad_files:
        loader.merge_errors(all_gather_objects(state.accelerator, loader.new_errors()))
    loader.check_bad_files()
    epoch = (step.progress.step + 1) / step.progress.steps_per_epoch
    found = {"loss": mean_loss, "lr": step.lr, "data_wait": mean_wait, "epoch": epoch, "images_per_s": images_per_s}
    counts = {
        "bad_files": loader.unreadable, "nonfinite_steps": state.skipped, "skipped_steps": state.skipped_by_scaler,
    }  # fmt: skip
    found |= {name: count for name, count in counts.items() if count}
    metrics = step.output.metrics | (step.output.details() if step.output.details is not None else {})
    found |= {name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()}
    return {full_name(prefix, name): value for name, value in found.items()}


class ThroughputMeter:
    """Images a second, and the share of the time in which data was waited for."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._since, self._images, self._waited = time.perf_counter(), 0, 0.0

    def wait_start(self) -> None:
        self._asked = time.perf_counter()

    def wait_end(self, images: int) -> None:
        self._waited += time.perf_counter() - self._asked
        self._images += images

    def compute(self) -> tuple[float, float]:
        """Both since the last reset; resets."""
        seconds, images, waited = time.perf_counter() - self._since, self._images, self._waited
        self.reset()
        return images / seconds, waited / seconds
