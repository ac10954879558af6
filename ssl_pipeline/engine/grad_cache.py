"""The gradient of a large batch in the memory of a small one (GradCache, Gao et al. 2021).

Plain gradient accumulation would compare each sample with its own micro-batch alone. Here the first pass embeds all
micro-batches without a graph, the objective sees the embeddings of the whole batch, and the second pass carries the gradient of
each embedding through the network, one micro-batch at a time.

The gradient is that of the whole batch for networks that treat samples apart (GroupNorm, LayerNorm). BatchNorm takes its
statistics from the micro-batch in both passes: the gradient is then exact for a network whose BatchNorm sees micro-batches, and
running statistics move once a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import cast

import torch
from accelerate import Accelerator
from torch import nn

from ssl_pipeline.data.batch import Batch
from ssl_pipeline.engine.nonfinite import BatchNormSnapshot
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
