"""A step whose loss or gradient is not finite: what is done about it, and the search for its cause."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor
from torch.distributed.tensor import DTensor

from ssl_pipeline.config.base import FrozenModel, UserError
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.engine.distributed import all_gather_objects
from ssl_pipeline.engine.task import Task

_FILE_NAME, _TOLD = "nonfinite.json", 5


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


@dataclass
class NonFiniteReport:
    """What one process knows of a bad step; written as JSON."""

    process: int
    loss: str  # JSON has no NaN
    samples: list[int]  # those whose images or embeddings are not finite
    batch: list[int]  # all samples of its share
    gradients: list[str] = field(default_factory=list)  # parameters whose gradient is not finite
    own: bool = False  # whether these gradients are from before the exchange, and so this process's alone

    def __str__(self) -> str:
        gradients = f"the gradient of {self.gradients[0]}" if self.gradients else "a gradient"
        what = f"a loss of {self.loss}" if self.bad_loss else gradients
        numbers = self.samples or self.batch
        listed = ", ".join(map(str, numbers[:_TOLD])) + (", …" if len(numbers) > _TOLD else "")
        which = "with images or embeddings that are not finite" if self.samples else "the whole share"
        return f"process {self.process} has {what} ({len(numbers)} sample(s), {which}: {listed})"

    @property
    def bad_loss(self) -> bool:
        return self.loss in ("nan", "inf", "-inf")


def report_nonfinite(
    task: Task, batch: Batch, loss: Tensor, accelerator: Accelerator, alone: bool, folder: Path | None
) -> NonFiniteError:
    """The error of a bad step, after its backward pass; called on all processes, once: it costs another step.

    ``alone``: whether the gradient can be computed again without the other processes (a plain replica, a batch in one piece).
    ``folder`` gets a file with the cause.
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
    step, found = batch.clock.taken, all_gather_objects(accelerator, mine)
    # A loss that compares samples of all processes carries one's bad gradient to the others: gradients are the weakest sign.
    guilty = [one for one in found if one.bad_loss or one.samples]
    guilty = guilty or [one for one in found if one.own and one.gradients] or found
    message = (
        f"step {step} gives no finite number: {'; '.join(map(str, guilty[:_TOLD]))}. Nothing was changed by this step"
    )
    if folder is not None:
        file = folder / _FILE_NAME
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            tree = {"step": step, "processes": [asdict(one) for one in found]}
            file.write_text(json.dumps(tree, indent=1), encoding="utf-8")
        message += f", and the state before it is saved; {file} lists all samples"
    return NonFiniteError(
        f"{message}. Lower `optim.lr`, lengthen `optim.warmup`, or raise the temperature; `optim.nonfinite.action=skip` passes "
        "over such steps."
    )


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
