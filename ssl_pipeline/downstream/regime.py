"""How stage two trains: a probe on fixed features, all layers, or the one and then the other.

Linear probing first keeps fine-tuning from distorting the features while the head is still random (Kumar et al. 2022).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from accelerate import Accelerator
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import Strict
from ssl_pipeline.data.loader import Preprocessing, Share, StepBatches
from ssl_pipeline.data.source import Indexed
from ssl_pipeline.downstream.task import DownstreamTask
from ssl_pipeline.engine.fit import fit
from ssl_pipeline.engine.optim import OptimConfig, build_optimizer
from ssl_pipeline.evaluate.features import extract
from ssl_pipeline.schedules import Clock, Duration, parse_duration
from ssl_pipeline.views.policy import Views


class RegimeConfig(Strict):
    """A regime.

    Attributes:
        name: ``frozen``: the probe alone. ``lp_ft``: the probe, then all layers. ``end_to_end``: all layers from a
            random head. ``scratch``: all layers, the encoder random too.
        decays: the probe's weight decays to choose from on validation labels; the first one when there are none.
        length: of the training of all layers.
        least_steps: and at least so many steps: few labels make short epochs.
        batch: samples of a step, or a little fewer so that an epoch leaves few labels out.
        backbone_lr_factor: the encoder's share of the learning rate.
        optim: for the training of all layers.
    """

    name: Literal["frozen", "lp_ft", "end_to_end", "scratch"] = "lp_ft"
    decays: tuple[float, ...] = Field((0.1, 0.001, 0.01, 1.0), min_length=1)
    length: Duration = parse_duration("30 epochs")
    least_steps: int = Field(0, ge=0)
    batch: int = Field(64, ge=2)
    backbone_lr_factor: float = Field(1.0, gt=0)
    optim: OptimConfig = OptimConfig()

    @property
    def probes(self) -> bool:
        """Whether the head is first fitted on fixed features."""
        return self.name in ("frozen", "lp_ft")

    @property
    def trains_all(self) -> bool:
        """Whether all layers are trained."""
        return self.name != "frozen"


@dataclass(frozen=True)
class Labelled:
    """What a regime learns from: a source's labelled part, and held-out *training* labels for selection, or None."""

    train: Indexed
    validation: Indexed | None


def score(task: DownstreamTask, source: Indexed, preprocessing: Preprocessing, share: Share) -> dict[str, float]:
    """The task's figures on a labelled source."""
    assert source.labels is not None
    return task.score(extract(task, source, preprocessing, share, forward=task.predict), source.labels)


def train(
    regime: RegimeConfig,
    task: DownstreamTask,
    labelled: Labelled,
    views: Views,
    preprocessing: Preprocessing,
    seed: int,
    accelerator: Accelerator,
    share: Share,
    workers: int | None = None,
) -> None:
    """Trains a task in place by a regime; selection looks at validation labels alone."""
    if regime.probes:
        _probe(regime, task, labelled, preprocessing, share)
    if regime.trains_all:
        _train_all(regime, task, labelled, views, preprocessing, seed, accelerator, share, workers)


def _probe(
    regime: RegimeConfig, task: DownstreamTask, labelled: Labelled, preprocessing: Preprocessing, share: Share
) -> None:
    labels, held_out = labelled.train.labels, labelled.validation
    assert labels is not None
    features = extract(task, labelled.train, preprocessing, share, forward=task.neck_features)
    decay = regime.decays[0]
    if held_out is not None and len(regime.decays) > 1:
        scores = dict.fromkeys(sorted(regime.decays, reverse=True), 0.0)
        for candidate in scores:
            _fit_head(task, features, labels, candidate)
            scores[candidate] = _first(score(task, held_out, preprocessing, share))
        decay = max(scores, key=lambda d: scores[d])
    _fit_head(task, features, labels, decay)


def _fit_head(task: DownstreamTask, features: Tensor, labels: Tensor, decay: float) -> None:
    device = next(task.head.parameters()).device
    task.fit_head(features.to(device), labels.to(device), decay)


def _train_all(
    regime: RegimeConfig,
    task: DownstreamTask,
    labelled: Labelled,
    views: Views,
    preprocessing: Preprocessing,
    seed: int,
    accelerator: Accelerator,
    share: Share,
    workers: int | None,
) -> None:
    task.backbone_lr_factor = regime.backbone_lr_factor
    labels = len(labelled.train)
    size = labels // math.ceil(labels / regime.batch) // share.processes * share.processes
    steps_per_epoch = labels // size
    total = max(1, regime.least_steps, regime.length.steps(steps_per_epoch, 0))
    batches = StepBatches(labelled.train, views, size, seed, share, total, workers, with_labels=True)
    optimizer = build_optimizer(regime.optim, task, size)
    evaluate, every, best = None, 0, _Best(task)
    if labelled.validation is not None:
        held_out = labelled.validation
        evaluate = best.watch(lambda: score(task, held_out, preprocessing, share))
        every = max(steps_per_epoch, total // 20)
    fit(task, batches, regime.optim, optimizer, accelerator, evaluate=evaluate, evaluate_every=every, log_every=total)
    best.restore()
    accelerator.free_memory()


class _Best:
    """Keeps the weights that scored best on validation labels; the earliest of equals."""

    def __init__(self, task: DownstreamTask) -> None:
        self._task, self._value, self._state = task, float("-inf"), dict[str, Any]()

    def watch(self, run: Callable[[], dict[str, float]]) -> Callable[[Clock], Mapping[str, float]]:
        def evaluate(clock: Clock) -> Mapping[str, float]:
            del clock
            figures = run()
            if _first(figures) > self._value:
                self._value, self._state = _first(figures), copy.deepcopy(self._task.state_dict())
            return {f"validation/{name}": value for name, value in figures.items()}

        return evaluate

    def restore(self) -> None:
        if self._state:
            self._task.load_state_dict(self._state)


def _first(figures: dict[str, float]) -> float:
    return next(iter(figures.values()))
