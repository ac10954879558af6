"""The solved probe: a head fitted to its minimum on fixed features, with a weight decay that labels choose."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ssl_pipeline.downstream.vector import PooledTask, Rows


def choose_decay(
    task: PooledTask, decays: Sequence[float], train: Rows, held_out: Rows | None, folds: Tensor | None
) -> float:
    """The weight decay whose head scores best on images that it was not fitted on; the largest of equals.

    Args:
        task: its head is fitted for each decay.
        decays: to choose from.
        train: what the head learns from, on its device.
        held_out: what a head is measured on where it is there; otherwise
        folds: each training row's part of a cross-validation (:class:`ssl_pipeline.downstream.labels.LabeledSplit`); the parts'
            predictions are scored together. With neither, the first decay.
    """
    if len(decays) == 1 or (held_out is None and folds is None):
        return decays[0]
    scores = dict[float, float]()
    for decay in sorted(decays, reverse=True):
        if held_out is not None:
            predictions, targets = _predicted(task, decay, train, held_out), held_out.targets
        else:
            assert folds is not None
            own = folds.to(train.targets.device)
            parts = [own == part for part in range(int(folds.max()) + 1)]
            predictions = torch.cat([_predicted(task, decay, train.only(~part), train.only(part)) for part in parts])
            targets = torch.cat([train.targets[part] for part in parts])
        scores[decay] = first_figure(task.score(predictions, targets.cpu()))
    return max(scores, key=lambda decay: scores[decay])


@torch.no_grad()
def _predicted(task: PooledTask, decay: float, train: Rows, measured: Rows) -> Tensor:
    """What a head that was fitted on some images makes of others, float32 on the CPU."""
    task.fit_head(train.features, train.targets, decay)
    return task.of_features(measured.features).float().cpu()


def first_figure(figures: dict[str, float]) -> float:
    """The one that selection goes by; larger is better, and what is no number is the least."""
    value = next(iter(figures.values()))
    return float("-inf") if math.isnan(value) else value
