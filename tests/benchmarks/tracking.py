"""What tracking costs a run: stage one with all mirrors and pictures, against the same with ``metrics.jsonl`` alone.

Both sides train the quickstart's model on the embedded images, with its logs; they alternate within one process. What a mirror does in
its own thread takes the same cores, so it is counted by processor time, too. Pictures are drawn a few times a run, so a set of them is
timed alone, and its share is that of the quickstart's steps. W&B is offline, and what its own process does is seen by the clock alone; start
and end, once a run whatever its length, stand apart.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from ssl_pipeline.config.command import load
from ssl_pipeline.data.build import build_loader
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.engine.distributed import dist_info, start_accelerator
from ssl_pipeline.engine.loop import Callback, fit
from ssl_pipeline.engine.optim import build_optimizer
from ssl_pipeline.engine.train_state import TrainState
from ssl_pipeline.evaluation.online import OnlineEvaluation
from ssl_pipeline.evaluation.plots import ImageLogger
from ssl_pipeline.logging.logger import LoggerCollection, TrackingConfig, open_loggers
from ssl_pipeline.logging.run import open_run
from ssl_pipeline.models.encoder import EncoderSpec
from ssl_pipeline.pretrain_config import PretrainConfig
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing
from tests.benchmarks.command import run

_STEPS, _FEW_STEPS = 20, 2
_IMPORTS = 2.0  # seconds for a mirror to start in its thread: that is no step's cost
_SIDES = {
    "off": TrackingConfig(name="off", log_images=False),
    "on": TrackingConfig(name="wandb", loggers=("tensorboard",)),
}


@dataclass(frozen=True)
class Cost:
    """Seconds of one side's steps.

    Attributes:
        wall: on the clock.
        processor: of all threads.
        told: on the clock, within the calls that tell the trackers.
        around: of the trackers' start and end.
    """

    wall: float
    processor: float
    told: float
    around: float


def measure(rounds: int) -> dict[str, float]:
    """Milliseconds of a step, off and on, and what tracking adds: medians, and of differences within a round."""
    os.environ["WANDB_MODE"] = "offline"
    accelerator = start_accelerator()
    config = load("pretrain", PretrainConfig, ["recipe=quickstart_pretrain"])
    for tracking in _SIDES.values():
        _steps(config, tracking, accelerator, _FEW_STEPS)  # imports and allocators
    found: dict[str, list[Cost]] = {name: [] for name in _SIDES}
    for _ in range(rounds):
        for name, tracking in _SIDES.items():
            found[name].append(_steps(config, tracking, accelerator, _STEPS))
    pairs = list(zip(found["off"], found["on"], strict=True))
    off, on = (statistics.median(cost.wall for cost in found[name]) / _STEPS for name in _SIDES)
    processor = statistics.median(cost.processor for cost in found["off"])
    told = statistics.median(cost.told for cost in found["on"]) / _STEPS
    views, evaluation = _pictures(config, rounds)
    steps = config.total_steps(len(_train(config)))
    # Views and the evaluations at the start and the end are drawn always, the others within 0.5 % of the time (`ImageLogger`).
    drawn = 100 * (views + 2 * evaluation) / (steps * off) + 0.5
    return {
        "tracking.step_off_ms": 1000 * off,
        "tracking.step_on_ms": 1000 * on,
        "tracking.added_time_percent": 100 * statistics.median(b.wall - a.wall for a, b in pairs) / _STEPS / off,
        "tracking.added_processor_time_percent": 100
        * statistics.median(b.processor - a.processor for a, b in pairs)
        / processor,
        "tracking.in_the_loop_percent": 100 * told / off,
        "tracking.pictures_of_an_evaluation_ms": 1000 * evaluation,
        "tracking.pictures_of_quickstart_at_most_percent": drawn,
        "tracking.seconds_to_start_and_end": statistics.median(b.around - a.around for a, b in pairs),
    }


def _train(config: PretrainConfig) -> IndexedDataset:
    train = config.data.open("train")
    assert isinstance(train, IndexedDataset)
    return train


def _blueprint(config: PretrainConfig, train: IndexedDataset) -> EncoderSpec:
    mean, std = train.mean or (0.5,) * train.channels, train.std or (0.25,) * train.channels
    return EncoderSpec(
        backbone=config.backbone,
        neck=config.neck,
        channels=train.channels,
        size=config.transform.size,
        mean=mean,
        std=std,
    )


@contextmanager
def _trackers(tracking: TrackingConfig) -> Iterator[tuple[LoggerCollection, list[float]]]:
    """The trackers of a run that is thrown away, and a list that gets the seconds of their start and end."""
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder, open_run(str(Path(folder) / "run"), "bench", "no", {}) as run:
        began = time.perf_counter()
        trackers = open_loggers(run, "pretrain", {}, tracking, 0)
        seconds.append(time.perf_counter() - began)
        yield trackers, seconds
        began = time.perf_counter()
        trackers.finish()
        seconds.append(time.perf_counter() - began)


def _steps(config: PretrainConfig, tracking: TrackingConfig, accelerator: Accelerator, steps: int) -> Cost:
    """Some steps of the quickstart's stage one, without its evaluations."""
    train, share = _train(config), dist_info(accelerator)
    blueprint = _blueprint(config, train)
    views = Views(config.transform.for_channels(train.channels)[0], blueprint.mean, blueprint.std, config.seed)
    task = config.pretext.build(blueprint.build()[0], train).to(share.device)
    batches = build_loader(train, views, config.batch_size, config.seed, share, steps, config.num_workers)
    optimizer = build_optimizer(config.optim, task, config.batch_size)
    told = 0.0
    with _trackers(tracking) as (trackers, seconds):
        time.sleep(_IMPORTS if tracking.name != "off" else 0)

        class Timed(Callback):
            """Logs, and counts the time that it takes."""

            def on_log(self, done: int, metrics: Mapping[str, float]) -> None:
                nonlocal told
                began = time.perf_counter()
                trackers.log(done, metrics)
                told += time.perf_counter() - began

        wall, processor = time.perf_counter(), time.process_time()
        fit(TrainState(task, optimizer, config.optim, accelerator), batches, [Timed()], config.log_every, "pretrain")
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
    accelerator.free_memory()
    return Cost(wall, processor, told, sum(seconds))


def _pictures(config: PretrainConfig, rounds: int) -> tuple[float, float]:
    """Seconds to draw and save the views, and what belongs to an evaluation: medians."""
    train, val, share = _train(config), config.data.open("val"), dist_info(start_accelerator())
    blueprint = _blueprint(config, train)
    views = Views(config.transform.for_channels(train.channels)[0], blueprint.mean, blueprint.std, config.seed)
    look = OnlineEvaluation(
        train, val, views, Preprocessing(config.transform.size, blueprint.mean, blueprint.std), share
    )
    look(blueprint.build()[0])
    found: list[tuple[float, float]] = []
    with _trackers(_SIDES["on"]) as (trackers, _):
        time.sleep(_IMPORTS)
        gallery = ImageLogger(trackers)
        for step in range(rounds + 1):
            began = time.perf_counter()
            gallery.views(step, train, config.transform, config.seed)
            between = time.perf_counter()
            gallery.evaluation(step, look.seen, must=True)
            found.append((between - began, time.perf_counter() - between))
    of_views, of_evaluations = zip(*found[1:], strict=True)
    return statistics.median(of_views), statistics.median(of_evaluations)


if __name__ == "__main__":
    run(measure, __doc__)
