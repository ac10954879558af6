"""A large batch on a small device: the gradient of the whole batch, from micro-batches (GradCache, Gao et al. 2021).

Plain accumulation of gradients would compare each sample with its own micro-batch alone. Here the first pass embeds all
micro-batches without keeping a graph, the objective sees the embeddings of the whole batch, and the second pass carries the
gradient of each embedding through the network, one micro-batch at a time.

The gradient is that of the whole batch for networks that treat samples apart (GroupNorm, LayerNorm). BatchNorm takes its
statistics from the micro-batch, in both passes alike: the gradient is then exact for a network whose batches, to BatchNorm,
are micro-batches; running statistics move once for each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.engine.task import StepOutput, Task


def two_pass(
    task: Task,
    model: nn.Module,
    batch: Batch,
    micro: int,
    accelerator: Accelerator,
    reseed: Callable[[int], None],
) -> StepOutput:
    """Forward and backward of one step.

    Args:
        task: the task itself.
        model: the task as the accelerator wrapped it.
        batch: this process's share of the batch.
        micro: samples of a micro-batch.
        accelerator: gives precision and processes.
        reseed: seeds the model's draws for a micro-batch: both passes must drop the same units.

    Returns:
        The objective's output; the gradients are in the parameters.
    """
    parts = batch.split(micro)
    pieces = []
    with torch.no_grad(), _statistics_kept(task), accelerator.autocast():
        for number, part in enumerate(parts):
            reseed(number)
            pieces.append(task.embed(part))
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


@contextmanager
def _statistics_kept(task: nn.Module) -> Iterator[None]:
    """Lets BatchNorm use a batch's statistics without adding them to the running ones: the second pass will.

    One that is in evaluation mode uses its running statistics, and keeps them.
    """
    norms = [
        norm for norm in task.modules() if isinstance(norm, _BatchNorm) and norm.training and norm.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    kept = [(norm.running_mean, norm.running_var, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        yield
    finally:
        for norm, (mean, var, count) in zip(norms, kept, strict=True):
            norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, var, count
            norm.track_running_stats = True
