"""A task in training: how the processes hold it, what a step does to it, and what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from ssl_pipeline.config.base import ConfigError, first_line
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.loader import TrainLoader
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.engine.distributed import all_gather_objects, broadcast_buffers, check_all_learn
from ssl_pipeline.engine.lost import explain
from ssl_pipeline.engine.numbers import (
    FILE_NAME,
    BatchNormSnapshot,
    NonFiniteError,
    all_reduce_status,
    find,
    gradient_check,
    sentence,
    write,
)
from ssl_pipeline.engine.optim import OptimConfig, set_rate
from ssl_pipeline.engine.sharded import copy_full_params, full_state_dict, shard_for_training, shard_state_dict
from ssl_pipeline.engine.task import StepOutput, Task
from ssl_pipeline.engine.two_pass import two_pass
from ssl_pipeline.rng import derive_seed
from ssl_pipeline.schedules import TrainProgress


class Step(NamedTuple):
    """What is known of a step once it is over.

    Attributes:
        clock: which one it was.
        output: this process's loss and metrics.
        rate: the learning rate it was taken with.
        signal: the number of the signal that a process was sent, 0 for none.
    """

    clock: TrainProgress
    output: StepOutput
    rate: float
    signal: int


class TrainState:
    """A task and its optimizer on this group of processes; what a step needs, and what is saved, is all here.

    Args:
        task: on the accelerator's device already; trained in place.
        batches: whose steps they are.
        optim: gives the rate of each step.
        optimizer: of the task's parameters.
        accelerator: gives precision and processes.
        checkpoints: where the state before a bad step is saved.
        micro: samples that a process embeds at once; None for its whole share of the batch.
        resume: a loaded checkpoint to continue from.

    Attributes:
        done: the steps that were done before.
        skipped: steps passed over because a number was not finite.
        skipped_by_scaler: steps that the gradient scaler passed over to find its scale.

    Raises:
        ConfigError: the checkpoint does not fit.
    """

    def __init__(
        self,
        task: Task,
        batches: TrainLoader,
        optim: OptimConfig,
        optimizer: Optimizer,
        accelerator: Accelerator,
        checkpoints: Checkpoints | None,
        micro: int | None,
        resume: Mapping[str, Any] | None,
    ) -> None:
        self._whole, self._batches, self._optim, self._accelerator = task, batches, optim, accelerator
        self._checkpoints, self._micro = checkpoints, micro
        self.done, self.skipped, self.skipped_by_scaler = 0, 0, 0
        self._rate = 0.0
        if resume is not None:
            with _must_fit():
                task.load_state_dict(resume["task"])
        self._task, self._optimizer = shard_for_training(task, optimizer, accelerator)
        self._model, self._prepared = accelerator.prepare(self._task, self._optimizer)
        if resume is not None:
            self._take_on(resume)
        self.begin()
        self._statistics = BatchNormSnapshot(self._task)

    def begin(self) -> None:
        """Training mode: at the start, and after whoever looked at the task."""
        self._model.train()

    def step(self, batch: Batch) -> Step:
        """Moves the task by a batch, on all processes or on none.

        Raises:
            NonFiniteError: the loss or gradient of any process is no finite number, and the step is not to be skipped.
            LostProcessError: another process was killed or hangs.
            ConfigError: the GPU's memory is not enough.
        """
        # Dropout and drop-path draw from torch's generator: reseeded by name, it has no state worth saving.
        self._reseed(batch.clock.taken, 0)
        self._statistics.keep()
        self._rate = rate = set_rate(self._optimizer, self._optim, batch.clock)
        try:
            output = self._backward(batch)
            if batch.clock.step == self.done and isinstance(self._model, nn.parallel.DistributedDataParallel):
                check_all_learn(self._task)
            for parameter in self._task.frozen(batch.clock):
                parameter.grad = None
            agreed = all_reduce_status(self._accelerator, output.loss, self._clip())
            if agreed.finite:
                self._prepared.step()  # the first one makes the optimizer's state, for which memory may be short as well
        except torch.cuda.OutOfMemoryError as error:
            short = ConfigError(
                f"the GPU's memory is not enough for {self._micro or len(batch.index)} samples a process: lower `batch.micro`, "
                "`batch.size` or `views.size`, take a smaller backbone, or add processes."
            )
            short.everywhere = False
            raise short from error
        except RuntimeError as error:
            raise explain(error, batch.clock.taken) or error from error
        if not agreed.finite:
            self._pass_over(batch, output.loss)
        elif self._prepared.step_was_skipped:  # by the gradient scaler: no weight moved, so nothing else may
            self._statistics.restore()
            self.skipped_by_scaler += 1
        else:
            self._task.after_step(batch)
        # Of the whole task: what the optimizer does not know of has gradients, too, and would keep a bad one for ever.
        self._task.zero_grad()
        return Step(batch.clock, output, rate, agreed.signal)

    def bring_together(self) -> None:
        """Makes the task what all processes will look at, save or continue from; called on all of them."""
        broadcast_buffers(self._task)
        copy_full_params(self._task, self._whole)

    def state(self, done: int) -> dict[str, Any]:
        """What a checkpoint keeps after ``done`` steps; called on all processes."""
        # A start from here does not find the bad files again.
        self._batches.merge_errors(all_gather_objects(self._accelerator, self._batches.new_errors()))
        scaler = self._accelerator.scaler.state_dict() if self._accelerator.scaler is not None else None
        state = {"task": self._task.state_dict(), "optimizer": self._optimizer.state_dict()}
        state = full_state_dict(state, keep=self._accelerator.is_main_process)
        skipped = (self.skipped, self.skipped_by_scaler)
        position = self._batches.position(done - self._batches.offset)
        about = {"position": position, "rate": self._rate, "batches": self._batches.state_dict(), "skipped": skipped}
        return {**state, "scaler": scaler, **about}

    def _take_on(self, resume: Mapping[str, Any]) -> None:
        """The rest of a checkpoint's state, once the task is prepared."""
        self.done = int(resume["done"])
        self.skipped, self.skipped_by_scaler = resume.get("skipped", (0, 0))
        # The optimizer's settings stay the configuration's, which ``resume=changed`` may have changed.
        groups = self._optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        with _must_fit():
            self._prepared.load_state_dict(shard_state_dict(resume["optimizer"], self._optimizer))
            for group, own_settings in zip(self._optimizer.param_groups, settings, strict=True):
                group.update(own_settings)
        self._batches.load_state_dict(resume["batches"])
        if self._accelerator.scaler is not None and resume["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(resume["scaler"])

    def _backward(self, batch: Batch) -> StepOutput:
        """The loss, and its gradient."""
        if self._micro is not None and self._micro < len(batch.index):
            reseed = partial(self._reseed, batch.clock.taken)
            return two_pass(self._task, self._model, batch, self._micro, self._accelerator, reseed)
        with self._accelerator.autocast():
            output: StepOutput = self._model(batch)
        self._accelerator.backward(output.loss)
        return output

    def _reseed(self, step: int, micro_batch: int) -> None:
        torch.manual_seed(derive_seed(self._batches.seed, "model", step, micro_batch, self._accelerator.process_index))

    def _clip(self) -> Tensor | None:
        """Clips the gradient where that is wanted; a number that is finite only if it was, or None where a scaler looks at it."""
        if self._optim.clip is not None:
            norm = self._accelerator.clip_grad_norm_(self._task.parameters(), self._optim.clip)
            return norm if self._accelerator.scaler is None else None
        return gradient_check(self._task.parameters()) if self._accelerator.scaler is None else None

    def _pass_over(self, batch: Batch, loss: Tensor) -> None:
        """Leaves everything as it was before a bad step, and counts it.

        Raises:
            NonFiniteError: it is one too many; the state before it is saved.
        """
        if self._accelerator.scaler is not None and self._optim.clip is not None:
            # Clipping has unscaled this step's gradients, which a scaler allows once a step: the step ends here.
            self._accelerator.scaler.update(self._accelerator.scaler.get_scale())
        self._statistics.restore()
        if self._optim.nonfinite.action == "stop" or self.skipped >= self._optim.nonfinite.limit:
            problem = self._examine(batch, loss)
            self._statistics.restore()
            broadcast_buffers(self._task)
            if self._checkpoints is not None:
                self._checkpoints.save(batch.clock.taken, self.state(batch.clock.taken))
                self._checkpoints.wait()
            raise problem
        self.skipped += 1

    def _examine(self, batch: Batch, loss: Tensor) -> NonFiniteError:
        """Looks for the cause of a bad step, and writes it down beside the checkpoints."""
        step = batch.clock.taken
        self._reseed(step, 0)
        alone = isinstance(self._model, nn.parallel.DistributedDataParallel) and self._micro is None
        alone = alone or self._accelerator.num_processes == 1
        findings = find(self._task, batch, loss, self._accelerator, alone)
        told = f"{sentence(step, findings)} Nothing was changed by this step"
        if self._checkpoints is not None:
            file = self._checkpoints.folder.parent / FILE_NAME
            if self._checkpoints.main:
                write(file, step, findings)
            told += f", and the state before it is saved; {file} lists all samples"
        return NonFiniteError(
            f"{told}. Lower `optim.lr`, lengthen `optim.warmup`, or raise the temperature; `optim.nonfinite.action=skip` passes "
            "over such steps."
        )


@contextmanager
def _must_fit() -> Iterator[None]:
    """Around the reading of a checkpoint's state: ``resume=changed`` can't carry it into another network."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the checkpoint does not fit this configuration ({first_line(error)}). `resume=changed` goes on with other rates, lengths and data, "
            "and not with another network, task or optimizer: undo that change, or choose another `output`."
        ) from error
