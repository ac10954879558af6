"""A task in training: how processes hold it, what a step does to it, and what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.loader import TrainLoader
from ssl_pipeline.engine.checkpoint import Checkpoints, must_fit
from ssl_pipeline.engine.distributed import all_gather_objects, broadcast_buffers, check_all_learn
from ssl_pipeline.engine.failures import explain
from ssl_pipeline.engine.fsdp import copy_full_params, full_state_dict, shard_for_training, shard_state_dict
from ssl_pipeline.engine.nonfinite import report_nonfinite
from ssl_pipeline.engine.optim import OptimConfig
from ssl_pipeline.engine.signals import pending_signal
from ssl_pipeline.engine.task import StepOutput, Task
from ssl_pipeline.models.batch_norm import running_statistics
from ssl_pipeline.rng import derive_seed
from ssl_pipeline.schedules import TrainProgress


class Step(NamedTuple):
    """What is known of a step once it is over; ``signal`` is the one that a process was sent, 0 for none."""

    progress: TrainProgress
    output: StepOutput
    lr: float
    signal: int


class TrainState:
    """A task and its optimizer in training: what a step needs and a checkpoint keeps.

    Args:
        task: on the accelerator's device already; trained in place.
        optimizer: of the task's parameters.
        optim: gives the learning rate of each step.
        accelerator: gives precision and processes.
        checkpoints: where the state is saved; None saves nothing.
        resume: a loaded checkpoint to continue from.
        micro: samples that a process embeds at once, see :func:`two_pass`; None for its whole share of the batch.

    Attributes:
        done: the steps that were done before.
        skipped: steps skipped because a number was not finite.
        skipped_by_scaler: steps that the gradient scaler skipped to find its scale.
    """

    def __init__(
        self,
        task: Task,
        optimizer: Optimizer,
        optim: OptimConfig,
        accelerator: Accelerator,
        checkpoints: Checkpoints | None = None,
        resume: Mapping[str, Any] | None = None,
        micro: int | None = None,
    ) -> None:
        self._whole, self._task, self._optimizer, self._optim = task, task, optimizer, optim
        self.accelerator, self.checkpoints, self.resume, self._micro = accelerator, checkpoints, resume, micro
        self.done, self.skipped, self.skipped_by_scaler, self._lr = 0, 0, 0, 0.0

    def start(self, loader: TrainLoader, beside: Callable[[], dict[str, Any]] = dict) -> None:
        """Prepares task and optimizer for this group of processes and the loader's steps, and loads the checkpoint.

        ``beside`` gives what else each checkpoint keeps, under names of its own.

        Raises:
            ConfigError: the checkpoint does not fit.
        """
        self._loader, self._beside, resume = loader, beside, self.resume
        if resume is not None:
            with must_fit():
                self._whole.load_state_dict(resume["task"])
        if self.accelerator.is_fsdp2:
            self._task, self._optimizer = shard_for_training(self._whole, self._optimizer, self.accelerator)
        self._model, self._prepared = self.accelerator.prepare(self._task, self._optimizer)
        if resume is not None:
            self._load(resume)
        self.train_mode()
        self._statistics = BatchNormSnapshot(self._task)

    def train_mode(self) -> None:
        """At the start, and after an evaluation."""
        self._model.train()

    def step(self, batch: Batch) -> Step:
        """Moves the task by a batch, on all processes or on none.

        Raises:
            NonFiniteError: the loss or gradient of any process is not finite, and the step is not to be skipped.
            LostProcessError: another process was killed or hangs.
            ConfigError: the GPU's memory is not enough.
        """
        # Dropout and drop-path draw from torch's generator: reseeded by name, it has no state to save.
        self._reseed(batch.clock.taken, 0)
        self._statistics.keep()
        self._lr = lr = self._optim.set_lr(self._optimizer.param_groups, batch.clock)
        try:
            output = self._backward(batch)
            if batch.clock.taken == self.done and isinstance(self._model, DistributedDataParallel):
                check_all_learn(self._task)
            for parameter in self._task.frozen(batch.clock):
                parameter.grad = None
            finite, signal = all_reduce_status(self.accelerator, output.loss, self._clip())
            if finite:
                self._prepared.step()  # the first one makes the optimizer's state, for which memory may be short as well
        except torch.cuda.OutOfMemoryError as error:
            short = ConfigError(
                f"the GPU's memory is not enough for {self._micro or len(batch.index)} samples a process: lower `micro_batch_size`, "
                "`batch_size` or `transform.size`, take a smaller backbone, or add processes."
            )
            short.everywhere = False
            raise short from error
        except RuntimeError as error:
            raise explain(error, batch.clock.taken) or error from error
        if not finite:
            self._skip(batch, output.loss)
        elif self._prepared.step_was_skipped:  # by the gradient scaler: no weight moved, so nothing else may
            self._statistics.restore()
            self.skipped_by_scaler += 1
        else:
            self._task.after_step(batch)
        # Of the whole task: parameters that the optimizer does not hold have gradients, too, and would keep a bad one for ever.
        self._task.zero_grad()
        return Step(batch.clock, output, lr, signal)

    def sync(self) -> None:
        """Gives all processes the same task to evaluate or save; called on all of them."""
        broadcast_buffers(self._task)
        if self._task is not self._whole:
            copy_full_params(self._task, self._whole)

    def save(self, done: int, wait: bool = False, **more: Any) -> None:
        """Saves a checkpoint after ``done`` steps, if the run keeps any; called on all processes, after :meth:`sync`."""
        if self.checkpoints is None:
            return
        self.checkpoints.save(done, self._beside() | self._state_dict(done) | more)
        if wait:
            self.checkpoints.wait()

    def _state_dict(self, done: int) -> dict[str, Any]:
        # A start from here does not find the bad files again.
        self._loader.merge_errors(all_gather_objects(self.accelerator, self._loader.new_errors()))
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        state = {"task": self._task.state_dict(), "optimizer": self._optimizer.state_dict()}
        if self._task is not self._whole:
            state = full_state_dict(state, keep=self.accelerator.is_main_process)
        return {
            **state, "scaler": scaler, "skipped": (self.skipped, self.skipped_by_scaler), "rate": self._lr,
            "position": self._loader.position(done - self._loader.offset), "batches": self._loader.state_dict(),
        }  # fmt: skip

    def _load(self, resume: Mapping[str, Any]) -> None:
        self.done = int(resume["done"])
        self.skipped, self.skipped_by_scaler = resume["skipped"]
        # The optimizer's settings stay the configuration's, which ``resume=changed`` may have changed.
        groups = self._optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        with must_fit():
            sharded = self._task is not self._whole
            state = shard_state_dict(resume["optimizer"], self._optimizer) if sharded else resume["optimizer"]
            self._prepared.load_state_dict(state)
            for group, own_settings in zip(self._optimizer.param_groups, settings, strict=True):
                group.update(own_settings)
        self._loader.load_state_dict(resume["batches"])
        if self.accelerator.scaler is not None and resume["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(resume["scaler"])

    def _backward(self, batch: Batch) -> StepOutput:
        if self._micro is not None and self._micro < len(batch.index):
            reseed = partial(self._reseed, batch.clock.taken)
            return two_pass(self._task, self._model, batch, self._micro, self.accelerator, reseed)
        with self.accelerator.autocast():
            output: StepOutput = self._model(batch)
        self.accelerator.backward(output.loss)
        return output

    def _reseed(self, step: int, micro_batch: int) -> None:
        torch.manual_seed(derive_seed(self._loader.seed, "model", step, micro_batch, self.accelerator.process_index))

    def _clip(self) -> Tensor | None:
        """Clips the gradient if asked to; a number that is finite only if it was, or None where a scaler checks it."""
        if self._optim.grad_clip_norm is not None:
            norm = self.accelerator.clip_grad_norm_(self._task.parameters(), self._optim.grad_clip_norm)
            return norm if self.accelerator.scaler is None else None
        return gradient_check(self._task.parameters()) if self.accelerator.scaler is None else None

    def _skip(self, batch: Batch, loss: Tensor) -> None:
        """Restores the state from before a bad step, and counts it.

        Raises:
            NonFiniteError: it is one too many; the state before it is saved.
        """
        if self.accelerator.scaler is not None and self._optim.grad_clip_norm is not None:
            # Clipping has unscaled this step's gradients, which a scaler allows once a step: the step ends here.
            self.accelerator.scaler.update(self.accelerator.scaler.get_scale())
        self._statistics.restore()
        if self._optim.nonfinite.action == "skip" and self.skipped < self._optim.nonfinite.limit:
            self.skipped += 1
            return
        self._reseed(batch.clock.taken, 0)
        alone = isinstance(self._model, DistributedDataParallel) and self._micro is None
        alone = alone or self.accelerator.num_processes == 1
        folder = None if self.checkpoints is None else self.checkpoints.folder.parent
        problem = report_nonfinite(self._task, batch, loss, self.accelerator, alone, folder)
        self._statistics.restore()
        broadcast_buffers(self._task)
        self.save(batch.clock.taken, wait=True)
        raise problem


class BatchNormSnapshot:
    """The running statistics of a task's BatchNorms before a step, whose forward pass moves them: a bad step must not."""

    def __init__(self, task: nn.Module) -> None:
        self._now = running_statistics(task)
        self._kept = [buffer.clone() for buffer in self._now]

    @torch.no_grad()
    def keep(self) -> None:
        if self._now:
            torch._foreach_copy_(self._kept, self._now)

    @torch.no_grad()
    def restore(self) -> None:
        if self._now:
            torch._foreach_copy_(self._now, self._kept)


def gradient_check(parameters: Iterable[nn.Parameter]) -> Tensor:
    """A number that is finite only if all gradients are: on a CPU their sum, which does not overflow as a norm's squares do.

    Of sharded gradients it covers this process's shards; ``all_reduce_status`` covers the others'.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients[0].is_cuda:  # a sum of each tensor would be a launch of each
        return get_total_norm(gradients)
    own = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    return torch.stack([gradient.sum() for gradient in own]).sum()


def all_reduce_status(accelerator: Accelerator, loss: Tensor, check: Tensor | None) -> tuple[bool, int]:
    """Whether loss and gradient are finite on all processes, and the signal that one of them was sent, 0 for none.

    The one exchange of every step: two numbers a process, and none where there is one process. ``check`` is finite only if the
    gradient is; None where a gradient scaler checks it.
    """
    if isinstance(check, DTensor):  # the norm of shared-out gradients
        check = check.full_tensor()
    watched = loss.detach().float() if check is None else loss.detach().float() + check.detach().float()
    if accelerator.num_processes == 1:
        return bool(torch.isfinite(watched)), pending_signal()
    mine = torch.stack([(~torch.isfinite(watched)).float(), watched.new_tensor(float(pending_signal()))])
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    bad, signal = mine.tolist()
    return not bad, int(signal)


def two_pass(
    task: Task, model: nn.Module, batch: Batch, micro: int, accelerator: Accelerator, reseed: Callable[[int], None]
) -> StepOutput:
    """Forward and backward of one step: the gradient of a large batch in the memory of a small one (GradCache, Gao et al. 2021).

    Plain gradient accumulation would compare each sample with its own micro-batch alone. Here the first pass embeds all
    micro-batches without a graph, the objective sees the embeddings of the whole batch, and the second pass carries the gradient
    of each embedding through the network, one micro-batch at a time.

    The gradient is that of the whole batch for networks that treat samples apart (GroupNorm, LayerNorm). BatchNorm takes its
    statistics from the micro-batch in both passes: the gradient is then exact for a network whose BatchNorm sees micro-batches,
    and running statistics move once a micro-batch.

    ``model`` is the task as the accelerator wrapped it, and ``reseed`` seeds the model's draws for a micro-batch: both passes must
    drop the same units. The gradients are then in the parameters.
    """
    parts, statistics = batch.split(micro), BatchNormSnapshot(task)
    pieces = []
    with torch.no_grad(), accelerator.autocast():
        for number, part in enumerate(parts):
            reseed(number)
            pieces.append(task.embed(part))
    statistics.restore()  # the second pass moves them
    embeddings = {name: torch.cat([piece[name] for piece in pieces]).requires_grad_() for name in pieces[0]}
    with accelerator.autocast():
        output = task.objective(embeddings, batch)
    # What the objective itself learns (a temperature, prototypes) has its whole gradient now.
    learned = [parameter for parameter in task.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(output.loss, [*embeddings.values(), *learned], allow_unused=True)
    by_embedding = {name: g for name, g in zip(embeddings, found[: len(embeddings)], strict=True) if g is not None}
    by_parameter = [(p, g) for p, g in zip(learned, found[len(embeddings) :], strict=True) if g is not None]
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        # Processes exchange gradients once, with the last micro-batch: it has to carry the objective's parameters, too.
        with nullcontext() if last else accelerator.no_sync(model):
            reseed(number)
            rows = slice(number * micro, number * micro + len(part.index))
            with accelerator.autocast():
                loss = cast(StepOutput, model(part, {name: g[rows] for name, g in by_embedding.items()})).loss
            if last:
                for parameter, gradient in by_parameter:
                    loss = loss + (parameter * gradient).sum()
            accelerator.backward(loss)
    return output
