"""What tracking costs a run: stage one with all mirrors and pictures, against the same with ``metrics.jsonl`` alone.

Both sides train the quickstart's model on the embedded images, with its logs and evaluations; they alternate within one process. What
a mirror does in its own thread takes the same cores, so it is counted by processor time, too. W&B is offline, and its start and
end, which happen once a run whatever its length, stand apart.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ssl_pipeline.config.command import load
from ssl_pipeline.data.lanes import training_batches
from ssl_pipeline.data.loader import Preprocessing
from ssl_pipeline.data.source import Indexed
from ssl_pipeline.engine.distributed import share_of, start_accelerator
from ssl_pipeline.engine.fit import fit
from ssl_pipeline.engine.optim import build_optimizer
from ssl_pipeline.evaluate.online import OnlineEvaluation
from ssl_pipeline.evaluate.pictures import Gallery
from ssl_pipeline.model.artifact import Blueprint
from ssl_pipeline.pretrain import PretrainConfig
from ssl_pipeline.schedules import Clock
from ssl_pipeline.track.run import open_run
from ssl_pipeline.track.tracker import TrackingConfig, open_trackers
from ssl_pipeline.views.policy import Views

_STEPS, _LOG_EVERY, _LOOK_EVERY = 60, 10, 30  # two evaluations with pictures: more often than any recipe of ours
_SIDES = {
    "off": TrackingConfig(name="off", pictures=False),
    "on": TrackingConfig(name="wandb", mirrors=("tensorboard",)),
}


def measure(rounds: int) -> dict[str, float]:
    """Seconds of 60 steps with two evaluations, off and on, and what tracking adds: medians, and of differences within a round."""
    os.environ["WANDB_MODE"] = "offline"
    accelerator = start_accelerator()
    config = load("pretrain", PretrainConfig, ["recipe=quickstart_pretrain"])
    _run(config, _SIDES["on"], accelerator)  # imports and allocators
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in _SIDES}
    for _ in range(rounds):
        for name, tracking in _SIDES.items():
            found[name].append(_run(config, tracking, accelerator))

    def added(place: int) -> float:
        pairs = zip(found["off"], found["on"], strict=True)
        return statistics.median(on[place] - off[place] for off, on in pairs)

    off = statistics.median(wall for wall, _, _ in found["off"])
    return {
        "tracking.step_off_ms": 1000 * off / _STEPS,
        "tracking.step_on_ms": 1000 * statistics.median(wall for wall, _, _ in found["on"]) / _STEPS,
        "tracking.added_time_percent": 100 * added(0) / off,
        "tracking.added_processor_time_percent": 100 * added(1) / statistics.median(cpu for _, cpu, _ in found["off"]),
        "tracking.seconds_to_start_and_end": added(2),
    }


def _run(config: PretrainConfig, tracking: TrackingConfig, accelerator: Accelerator) -> tuple[float, float, float]:
    """Seconds of the steps, their processor seconds, and seconds of opening and closing the trackers."""
    train, dev = config.data.open("train"), config.data.open("dev")
    assert isinstance(train, Indexed)
    share = share_of(accelerator)
    settled, _ = config.views.for_channels(train.channels)
    mean, std = train.mean or (0.5,) * train.channels, train.std or (0.25,) * train.channels
    blueprint = Blueprint(
        backbone=config.backbone, neck=config.neck, channels=train.channels, size=config.views.size, mean=mean, std=std
    )
    encoder, _ = blueprint.build()
    task = config.pretext.build(encoder, train).to(share.device)
    views = Views(settled, mean, std, config.seed)
    batches = training_batches(train, views, config.batch.size, config.seed, share, _STEPS, config.workers)
    optimizer = build_optimizer(config.optim, task, config.batch.size)
    evaluation = OnlineEvaluation(train, dev, views, Preprocessing(config.views.size, mean, std), share)
    with tempfile.TemporaryDirectory() as folder, open_run(str(Path(folder) / "run"), "bench", "no", {}) as run:
        opened = time.perf_counter()
        trackers = open_trackers(run, "pretrain", {}, tracking, 0)
        gallery = Gallery(trackers)
        opening = time.perf_counter() - opened
        time.sleep(3 if tracking.name != "off" else 0)  # the mirrors' imports, once a process, are over

        def evaluate(clock: Clock) -> dict[str, float]:
            figures = evaluation(encoder)
            gallery.evaluation(clock.step + 1, evaluation, must=False)
            return figures

        wall, cpu = _timed(lambda: fit(
            task, batches, config.optim, optimizer, accelerator, evaluate=evaluate, evaluate_every=_LOOK_EVERY,
            listeners=(trackers.log,), log_every=_LOG_EVERY, prefix="pretrain",
        ))  # fmt: skip
        closed = time.perf_counter()
        trackers.finish()
        closing = time.perf_counter() - closed
    accelerator.free_memory()
    return wall, cpu, opening + closing


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu
