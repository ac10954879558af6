"""All processes skip or stop before the optimizer's step if the loss or gradient of any is not finite."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from ssl_pipeline.config.base import FrozenModel, UserError
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.engine.signals import pending_signal
from ssl_pipeline.engine.task import Task
from ssl_pipeline.models.batch_norm import running_statistics

FILE_NAME = "nonfinite.json"
_TOLD = 5


class NonFiniteConfig(FrozenModel):
    """What is done at a step whose loss or gradient is not finite.

    Attributes:
        action: ``stop`` ends the run with a checkpoint from before the step. ``skip`` passes over the step, and counts it.
        limit: steps of a run that are passed over; one more ends it.
    """

    action: Literal["stop", "skip"] = "stop"
    limit: int = Field(10, ge=0)


class NonFiniteError(UserError):
    """The loss or gradient is not finite; raised on all processes, and the step has changed nothing."""

    exit_code = 1


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


class StepStatus(NamedTuple):
    """Whether loss and gradient are finite on all processes, and the signal that one of them was sent, 0 for none."""

    finite: bool
    signal: int


def gradient_check(parameters: Iterable[nn.Parameter]) -> Tensor:
    """A number that is finite only if all gradients are: on a CPU their sum, which does not overflow as a norm's squares do.

    Of sharded gradients it covers this process's shards; ``all_reduce_status`` covers the others'.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients[0].is_cuda:  # a sum of each tensor would be a launch of each
        return get_total_norm(gradients)
    own = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    return torch.stack([gradient.sum() for gradient in own]).sum()


def all_reduce_status(accelerator: Accelerator, loss: Tensor, check: Tensor | None) -> StepStatus:
    """The one exchange of every step: two numbers a process, and none where there is one process.

    Args:
        accelerator: gives the processes.
        loss: this process's.
        check: finite only if the gradient is; None where a gradient scaler checks it.
    """
    if isinstance(check, DTensor):  # the norm of shared-out gradients
        check = check.full_tensor()
    watched = loss.detach().float() if check is None else loss.detach().float() + check.detach().float()
    if accelerator.num_processes == 1:
        return StepStatus(bool(torch.isfinite(watched)), pending_signal())
    mine = torch.stack([(~torch.isfinite(watched)).float(), watched.new_tensor(float(pending_signal()))])
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    bad, signal = mine.tolist()
    return StepStatus(not bad, int(signal))


@dataclass
class NonFiniteReport:
    """What one process knows of a bad step; written as JSON."""

    process: int
    loss: str  # JSON has no NaN
    samples: list[int]  # those whose images or embeddings are not finite
    batch: list[int]  # all samples of its share
    gradients: list[str] = field(default_factory=list)  # parameters whose gradient is not finite
    own: bool = False  # whether these gradients are from before the exchange, and so this process's alone

    @property
    def starts_it(self) -> bool:
        """Whether this process's own loss or samples are not finite."""
        return self.loss in ("nan", "inf", "-inf") or bool(self.samples)


def find(task: Task, batch: Batch, loss: Tensor, accelerator: Accelerator, alone: bool) -> list[NonFiniteReport]:
    """Looks for the cause of a bad step, after its backward pass; called on all processes, once: it costs another step.

    Args:
        task: that took the step.
        batch: this process's share.
        loss: this process's.
        accelerator: gives the processes.
        alone: whether the gradient can be computed again without the other processes (a plain replica, a batch in one piece).

    Returns:
        One report a process, the same list on all.
    """
    mine = NonFiniteReport(
        accelerator.process_index, str(float(loss.detach())), _bad_samples(task, batch), batch.index.tolist(), own=alone
    )
    named = [(name, p) for name, p in task.named_parameters() if p.requires_grad]
    gradients = [p.grad for _, p in named]
    if alone and accelerator.num_processes > 1:
        with accelerator.autocast():
            again = task(batch).loss
        gradients = list(torch.autograd.grad(again, [p for _, p in named], allow_unused=True))
    mine.gradients = [
        name for (name, _), g in zip(named, gradients, strict=True) if g is not None and not torch.isfinite(g).all()
    ]
    if accelerator.num_processes == 1:
        return [mine]
    found: list[NonFiniteReport] = [mine] * accelerator.num_processes
    dist.all_gather_object(found, mine)
    return found


def report_nonfinite(
    task: Task, batch: Batch, loss: Tensor, accelerator: Accelerator, alone: bool, folder: Path | None
) -> NonFiniteError:
    """The error of a bad step, whose cause is written into a file of ``folder``, if there is one; see :func:`find`."""
    step, findings = batch.clock.taken, find(task, batch, loss, accelerator, alone)
    message = f"{sentence(step, findings)} Nothing was changed by this step"
    if folder is not None:
        file = folder / FILE_NAME
        if accelerator.is_main_process:
            file.parent.mkdir(parents=True, exist_ok=True)
            tree = {"step": step, "processes": [asdict(finding) for finding in findings]}
            file.write_text(json.dumps(tree, indent=1), encoding="utf-8")
        message += f", and the state before it is saved; {file} lists all samples"
    return NonFiniteError(
        f"{message}. Lower `optim.lr`, lengthen `optim.warmup`, or raise the temperature; `optim.nonfinite.action=skip` passes "
        "over such steps."
    )


def sentence(step: int, findings: list[NonFiniteReport]) -> str:
    """What is wrong with a step: which process, what, and which samples."""
    # A loss that compares samples of all processes carries one's bad gradient to the others: gradients are the weakest sign.
    guilty = [finding for finding in findings if finding.starts_it]
    guilty = guilty or [finding for finding in findings if finding.own and finding.gradients] or findings
    return f"step {step} gives no finite number: " + "; ".join(_told(finding) for finding in guilty[:_TOLD]) + "."


def _told(finding: NonFiniteReport) -> str:
    gradients = f"the gradient of {finding.gradients[0]}" if finding.gradients else "a gradient"
    what = "" if finding.loss not in ("nan", "inf", "-inf") else f"a loss of {finding.loss}"
    numbers = finding.samples or finding.batch
    listed = ", ".join(map(str, numbers[:_TOLD])) + (", …" if len(numbers) > _TOLD else "")
    which = "with images or embeddings that are not finite" if finding.samples else "the whole share"
    return f"process {finding.process} has {what or gradients} ({len(numbers)} sample(s), {which}: {listed})"


@torch.no_grad()
def _bad_samples(task: Task, batch: Batch) -> list[int]:
    """Samples with an image or embedding that is not finite; by BatchNorm's running statistics, which keep samples apart."""
    bad = torch.zeros(len(batch.index), dtype=torch.bool, device=batch.index.device)
    for view in batch.views:
        # Of a batch of two sides, the later views are the second side's alone.
        bad[-len(view) :] |= ~torch.isfinite(view.flatten(1)).all(1)
    if any(isinstance(parameter, DTensor) for parameter in task.parameters()):
        return batch.index[bad].tolist()  # FSDP2 gathers weights for the whole forward alone
    modes = [(module, module.training) for module in task.modules()]
    task.eval()
    embeddings = task.embed(batch)
    for module, mode in modes:
        module.training = mode
    rows = [value for value in embeddings.values() if isinstance(value, Tensor) and len(value) == len(bad)]
    for value in rows:
        bad |= ~torch.isfinite(value.flatten(1)).all(1)
    return batch.index[bad].tolist()
