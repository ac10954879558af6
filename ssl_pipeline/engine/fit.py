"""The one loop of both stages. Read it from top to bottom: it does nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from ssl_pipeline.config.base import ConfigError, UserError
from ssl_pipeline.data.lanes import StreamBatches
from ssl_pipeline.data.loader import StepBatches
from ssl_pipeline.draws import derive_seed
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.engine.distributed import agree_on_buffers
from ssl_pipeline.engine.optim import OptimConfig, set_rate
from ssl_pipeline.engine.task import Task
from ssl_pipeline.engine.two_pass import two_pass
from ssl_pipeline.schedules import Clock
from ssl_pipeline.track.names import full_name


class NonFiniteLossError(UserError):
    """The loss is no number; raised on all processes before the optimizer could spoil the weights."""


class Listener(Protocol):
    """Hears the figures of a step: a tracker, a progress bar."""

    def __call__(self, done: int, figures: Mapping[str, float], /) -> None:
        """``done`` steps are done."""


Evaluation = Callable[[Clock], Mapping[str, float]]


def fit(
    task: Task,
    batches: StepBatches | StreamBatches,
    optim: OptimConfig,
    optimizer: Optimizer,
    accelerator: Accelerator,
    checkpoints: Checkpoints | None = None,
    resume: Mapping[str, Any] | None = None,
    evaluate: Evaluation | None = None,
    evaluate_every: int = 0,
    listeners: tuple[Listener, ...] = (),
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
        log_every: steps between two logs.
        prefix: group of the step's own figures.
        micro: samples that a process embeds at once; None for its whole share of the batch.

    Raises:
        NonFiniteLossError: the loss of any process is no number.
        ConfigError: the GPU's memory is not enough.
    """
    start = 0
    model, prepared = accelerator.prepare(task, optimizer)
    if resume is not None:
        start = int(resume["done"])
        task.load_state_dict(resume["task"])
        prepared.load_state_dict(resume["optimizer"])
        if accelerator.scaler is not None and resume["scaler"] is not None:
            accelerator.scaler.load_state_dict(resume["scaler"])
    total, seed = batches.total_steps, batches.seed
    model.train()
    since, images, waited = time.perf_counter(), 0, 0.0
    asked = since
    for batch in batches.from_step(start):
        waited += time.perf_counter() - asked
        clock, done = batch.clock, batch.clock.step + 1
        # Dropout and drop-path draw from torch's generator: reseeded by name, it has no state worth saving.
        reseed = partial(_reseed, seed, clock.step, accelerator.process_index)
        reseed(0)
        check = partial(_stop_if_not_finite, clock, accelerator)
        rate = set_rate(optimizer, optim, clock)
        try:
            if micro is not None and micro < len(batch.index):
                output = two_pass(task, model, batch, micro, accelerator, reseed, check)
            else:
                with accelerator.autocast():
                    output = model(batch)
                check(output.loss)
                accelerator.backward(output.loss)
        except torch.cuda.OutOfMemoryError as error:
            raise ConfigError(
                f"the GPU's memory is not enough for {micro or len(batch.index)} samples a process: lower `batch.micro`, "
                "`batch.size` or `views.size`, take a smaller backbone, or add processes."
            ) from error
        if optim.clip is not None:
            accelerator.clip_grad_norm_(task.parameters(), optim.clip)
        prepared.step()
        prepared.zero_grad()
        task.after_step(batch)

        images += len(batch.index) * accelerator.num_processes
        figures: dict[str, float] = {}
        if done % log_every == 0 or done == total:
            now = time.perf_counter()
            loss, wait, bad_files = _over_processes(
                accelerator, output.loss.detach().float(), waited / (now - since), batches.unreadable
            )
            batches.bear(bad_files)
            found = {"loss": loss, "lr": rate, "data_wait": wait, "epoch": done / clock.steps_per_epoch}
            found |= {"images_per_s": images / (now - since)} | ({"bad_files": bad_files} if bad_files else {})
            metrics = output.metrics | (output.details() if output.details is not None else {})
            found |= {name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()}
            figures |= {full_name(prefix, name): value for name, value in found.items()}
            since, images, waited = now, 0, 0.0
        looks = evaluate is not None and _due(done, total, evaluate_every)
        if looks or done == total:
            agree_on_buffers(task)
        if looks and evaluate is not None:
            figures |= evaluate(clock)
            model.train()
            since, images, waited = time.perf_counter(), 0, 0.0
        if figures and accelerator.is_main_process:
            for listener in listeners:
                listener(done, figures)
        if checkpoints is not None and checkpoints.due(done, total):
            checkpoints.save(done, _state(task, optimizer, accelerator))
        asked = time.perf_counter()


def _over_processes(
    accelerator: Accelerator, loss: torch.Tensor, wait: float, bad_files: int
) -> tuple[float, float, int]:
    """The mean loss, the mean share of time spent waiting for data, and the sum of the bad files, in one exchange."""
    mine = torch.stack([loss, loss.new_tensor(wait), loss.new_tensor(bad_files)])
    mean_loss, mean_wait, mean_bad_files = accelerator.reduce(mine, reduction="mean").tolist()
    return mean_loss, mean_wait, round(mean_bad_files * accelerator.num_processes)


def _due(done: int, total: int, every: int) -> bool:
    """At each interval and at the end; an interval that ends just before the end is left to the end."""
    return every > 0 and (done == total or (done % every == 0 and total - done >= every / 2))


def _state(task: Task, optimizer: Optimizer, accelerator: Accelerator) -> dict[str, Any]:
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    return {"task": task.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler}


def _reseed(seed: int, step: int, process: int, micro_batch: int) -> None:
    torch.manual_seed(derive_seed(seed, "model", step, micro_batch, process))


def _stop_if_not_finite(clock: Clock, accelerator: Accelerator, loss: torch.Tensor) -> None:
    finite = torch.isfinite(loss.detach()).to(torch.int32)
    if accelerator.num_processes > 1:
        finite = accelerator.reduce(finite, reduction="sum") // accelerator.num_processes
    if not bool(finite):
        raise NonFiniteLossError(
            f"the loss of step {clock.step} is not a finite number. Nothing was changed by this step; the last checkpoint "
            "is from before it. Lower `optim.lr`, lengthen `optim.warmup`, or raise the temperature."
        )
