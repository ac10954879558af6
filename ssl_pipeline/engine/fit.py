"""The one loop of both stages. Read it from top to bottom: it does nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.lanes import StreamBatches
from ssl_pipeline.data.loader import StepBatches
from ssl_pipeline.draws import derive_seed
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.engine.distributed import agree_on_buffers, from_every
from ssl_pipeline.engine.lost import explain, own
from ssl_pipeline.engine.numbers import (
    FILE_NAME,
    NonFiniteError,
    Statistics,
    agree,
    find,
    gradient_check,
    sentence,
    write,
)
from ssl_pipeline.engine.optim import OptimConfig, set_rate
from ssl_pipeline.engine.sharded import gathered, hand_back, scattered, to_train
from ssl_pipeline.engine.signals import CutShortError, StoppedError
from ssl_pipeline.engine.task import Task
from ssl_pipeline.engine.two_pass import two_pass
from ssl_pipeline.schedules import Clock
from ssl_pipeline.track.names import full_name


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
        NonFiniteError: the loss or gradient of any process is no finite number, and the step is not to be skipped.
        StoppedError: a signal came; the state after the step it came in is saved.
        LostProcessError: another process, or a worker, was killed or hangs.
        ConfigError: the GPU's memory is not enough.
    """
    start, skipped, skipped_by_scaler, whole = 0, 0, 0, task
    if resume is not None:
        with _must_fit():
            whole.load_state_dict(resume["task"])
    task, optimizer = to_train(whole, optimizer, accelerator)
    model, prepared = accelerator.prepare(task, optimizer)
    if resume is not None:
        start = int(resume["done"])
        skipped, skipped_by_scaler = resume.get("skipped", (0, 0))
        with _must_fit():
            _take_on(prepared, optimizer, scattered(resume["optimizer"], optimizer))
        batches.load_state_dict(resume["batches"])
        if accelerator.scaler is not None and resume["scaler"] is not None:
            accelerator.scaler.load_state_dict(resume["scaler"])
    total, seed = batches.total_steps, batches.seed
    model.train()
    statistics = Statistics(task)
    since, images, waited = time.perf_counter(), 0, 0.0
    if resume is not None and "cut_short" in resume and evaluate is not None:
        _tell(listeners, start, resume["cut_short"] | evaluate(batches.clock(start - 1)), accelerator)
        model.train()
        since = time.perf_counter()
    asked = since
    for batch in own(batches.from_step(start), start, batches.workers):
        waited += time.perf_counter() - asked
        clock, done = batch.clock, batch.clock.step + 1
        # Dropout and drop-path draw from torch's generator: reseeded by name, it has no state worth saving.
        reseed = partial(_reseed, seed, clock.step, accelerator.process_index)
        reseed(0)
        statistics.keep()
        rate = set_rate(optimizer, optim, clock)
        try:
            if micro is not None and micro < len(batch.index):
                output = two_pass(task, model, batch, micro, accelerator, reseed)
            else:
                with accelerator.autocast():
                    output = model(batch)
                accelerator.backward(output.loss)
            check = _clip(task, optim, accelerator)
            agreed = agree(accelerator, output.loss, check)
            if agreed.finite:
                prepared.step()  # the first one makes the optimizer's state, for which memory may be short as well
        except torch.cuda.OutOfMemoryError as error:
            short = ConfigError(
                f"the GPU's memory is not enough for {micro or len(batch.index)} samples a process: lower `batch.micro`, "
                "`batch.size` or `views.size`, take a smaller backbone, or add processes."
            )
            short.everywhere = False
            raise short from error
        except RuntimeError as error:
            raise explain(error, clock.step) or error from error
        if agreed.finite:
            task.after_step(batch)
            skipped_by_scaler += prepared.step_was_skipped
        else:
            skipped += 1
            if accelerator.scaler is not None and optim.clip is not None:
                # Clipping has unscaled this step's gradients, which a scaler allows once a step: the step ends here.
                accelerator.scaler.update(accelerator.scaler.get_scale())
            problem = None
            statistics.restore()
            if optim.nonfinite.action == "stop" or skipped > optim.nonfinite.limit:
                problem = _examine(task, model, batch, output.loss, accelerator, reseed, checkpoints, micro)
                statistics.restore()
            if problem is not None:
                agree_on_buffers(task)
                if checkpoints is not None:
                    before = (skipped - 1, skipped_by_scaler)
                    checkpoints.save(clock.step, _state(task, optimizer, accelerator, batches, before))
                    checkpoints.wait()
                raise problem
        prepared.zero_grad()

        images += len(batch.index) * accelerator.num_processes
        figures: dict[str, float] = {}
        if done % log_every == 0 or done == total:
            now = time.perf_counter()
            loss, wait = _over_processes(accelerator, output.loss.detach().float(), waited / (now - since), batches)
            bad_files = batches.unreadable
            batches.bear(bad_files)
            found = {"loss": loss, "lr": rate, "data_wait": wait, "epoch": done / clock.steps_per_epoch}
            found["images_per_s"] = images / (now - since)
            counts = {"bad_files": bad_files, "nonfinite_steps": skipped, "skipped_steps": skipped_by_scaler}
            found |= {name: count for name, count in counts.items() if count}
            metrics = output.metrics | (output.details() if output.details is not None else {})
            found |= {name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()}
            figures |= {full_name(prefix, name): value for name, value in found.items()}
            since, images, waited = now, 0, 0.0
        looks = evaluate is not None and _due(done, total, evaluate_every)
        stops = agreed.signal != 0 and done < total
        saves = checkpoints is not None and (stops or checkpoints.due(done, total))
        if looks or saves or done == total:  # what one process saves, all will continue from
            agree_on_buffers(task)
            hand_back(task, whole)
        if looks and evaluate is not None:
            try:
                figures |= evaluate(clock)
            except CutShortError as cut:
                if checkpoints is not None:
                    state = _state(task, optimizer, accelerator, batches, (skipped, skipped_by_scaler))
                    checkpoints.save(done, {**state, "cut_short": figures})
                    checkpoints.wait()
                raise StoppedError(cut.number, done, total, saved=checkpoints is not None) from None
            model.train()
            since, images, waited = time.perf_counter(), 0, 0.0
        _tell(listeners, done, figures, accelerator)
        if checkpoints is not None and saves:
            checkpoints.save(done, _state(task, optimizer, accelerator, batches, (skipped, skipped_by_scaler)))
        if stops:
            if checkpoints is not None:
                checkpoints.wait()
            raise StoppedError(agreed.signal, done, total, saved=saves)
        asked = time.perf_counter()


@contextmanager
def _must_fit() -> Iterator[None]:
    """Around the reading of a checkpoint's state: ``resume=changed`` can't carry it into another network."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        told = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"the checkpoint does not fit this configuration ({told}). `resume=changed` goes on with other rates, lengths and data, "
            "and not with another network, task or optimizer: undo that change, or choose another `output`."
        ) from error


def _take_on(prepared: Optimizer, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """The optimizer's state from a checkpoint; its settings stay the configuration's, which ``resume=changed`` may have changed."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    prepared.load_state_dict(state)
    for group, own_settings in zip(optimizer.param_groups, settings, strict=True):
        group.update(own_settings)


def _tell(listeners: tuple[Listener, ...], done: int, figures: Mapping[str, float], accelerator: Accelerator) -> None:
    if figures and accelerator.is_main_process:
        for listener in listeners:
            listener(done, figures)


def _over_processes(
    accelerator: Accelerator, loss: torch.Tensor, wait: float, batches: StepBatches | StreamBatches
) -> tuple[float, float]:
    """The mean loss and the mean share of time spent waiting for data; bad files are told where there are new ones."""
    mine = torch.stack([loss, loss.new_tensor(wait), loss.new_tensor(float(bool(batches.untold())))])
    mean_loss, mean_wait, new = accelerator.reduce(mine, reduction="mean").tolist()
    if new:
        batches.learn(from_every(accelerator, batches.untold()))
    return mean_loss, mean_wait


def _due(done: int, total: int, every: int) -> bool:
    """At each interval and at the end; an interval that ends just before the end is left to the end."""
    return every > 0 and (done == total or (done % every == 0 and total - done >= every / 2))


def _state(
    task: Task,
    optimizer: Optimizer,
    accelerator: Accelerator,
    batches: StepBatches | StreamBatches,
    skipped: tuple[int, int],
) -> dict[str, Any]:
    batches.learn(from_every(accelerator, batches.untold()))  # a start from here does not find them again
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    state = {"task": task.state_dict(), "optimizer": optimizer.state_dict()}
    state = gathered(state, keep=accelerator.is_main_process)
    return {**state, "scaler": scaler, "batches": batches.state_dict(), "skipped": skipped}


def _reseed(seed: int, step: int, process: int, micro_batch: int) -> None:
    torch.manual_seed(derive_seed(seed, "model", step, micro_batch, process))


def _clip(task: Task, optim: OptimConfig, accelerator: Accelerator) -> torch.Tensor | None:
    """Clips the gradient where that is wanted; a number that is finite only if it was, or None where a scaler looks at it."""
    if optim.clip is not None:
        norm = accelerator.clip_grad_norm_(task.parameters(), optim.clip)
        return norm if accelerator.scaler is None else None
    return gradient_check(task.parameters()) if accelerator.scaler is None else None


def _examine(
    task: Task,
    model: nn.Module,
    batch: Batch,
    loss: torch.Tensor,
    accelerator: Accelerator,
    reseed: Callable[[int], None],
    checkpoints: Checkpoints | None,
    micro: int | None,
) -> NonFiniteError:
    """Looks for the cause of a bad step, and writes it down beside the checkpoints."""
    reseed(0)
    alone = isinstance(model, nn.parallel.DistributedDataParallel) and micro is None
    findings = find(task, batch, loss, accelerator, alone or accelerator.num_processes == 1)
    told = f"{sentence(batch.clock.step, findings)} Nothing was changed by this step"
    if checkpoints is not None:
        file = checkpoints.folder.parent / FILE_NAME
        if checkpoints.main:
            write(file, batch.clock.step, findings)
        told += f", and the state before it is saved; {file} lists all samples"
    return NonFiniteError(
        f"{told}. Lower `optim.lr`, lengthen `optim.warmup`, or raise the temperature; `optim.nonfinite.action=skip` passes over "
        "such steps."
    )
