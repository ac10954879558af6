"""A stage's run: its folder, checkpoints, loggers and terminal, opened and closed together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from pydantic import Field

from ssl_pipeline.config.base import ConfigError, FrozenModel, dump
from ssl_pipeline.data.loader import TrainLoader
from ssl_pipeline.engine.checkpoint import Checkpoints, check_steps_left
from ssl_pipeline.engine.distributed import all_gather_objects, broadcast_from_main, run_on_main
from ssl_pipeline.engine.loop import Callback
from ssl_pipeline.engine.signals import handle_signals
from ssl_pipeline.logging.jsonl import FILE_NAME, TRAINING_STEP, read_metrics, seconds_before
from ssl_pipeline.logging.logger import LoggerCollection, TrackingConfig, open_loggers
from ssl_pipeline.logging.progress import Progress
from ssl_pipeline.logging.run import Resume, RunFolder, open_run
from ssl_pipeline.schedules import Duration, parse_duration

_POINTS = 50  # that are logged of a loop of stage two


class RunConfig(FrozenModel):
    """The keys that both stages have for their run.

    Attributes:
        tracking: loggers beside ``metrics.jsonl``.
        seed: of every draw.
        output: the run's folder; null numbers them: ``runs/pretrain-001``, ….
        resume: ``auto`` continues the run in ``output``; ``changed`` does so despite another configuration or data.
        save_every: how often a state to resume from is kept, of a training's length; ``0 steps`` at the end only.
        save_total_limit: how many of them are kept.
        num_workers: processes that decode files; null chooses by the machine's cores.
    """

    tracking: TrackingConfig
    seed: int = Field(0, ge=0)
    output: str | None = None
    resume: Resume = "no"
    save_every: Duration = parse_duration("10%")
    save_total_limit: int = Field(2, ge=1)
    num_workers: int | None = Field(None, ge=0)


@contextmanager
def start_run(
    stage: str,
    config: RunConfig,
    accelerator: Accelerator,
    data: Mapping[str, str],
    loader: TrainLoader | None = None,
    in_steps: bool = False,
) -> Iterator[Run]:
    """Makes or continues the run's folder, and closes all that belongs to the run at the end.

    ``data`` are the fingerprints of what the run starts from, learns from and is measured on, by name. In a run with one loop a
    changed configuration must leave steps to do: its ``loader``, from its start, and whether its length is given ``in_steps``.

    Raises:
        ConfigError: the folder holds another run, is in use, or can't be written; on all processes.
    """
    settings = dump(config)

    def check_change(folder: Path) -> None:
        state = Checkpoints(folder / "checkpoints", main=False).load() if loader is not None else None
        if loader is not None and state is not None:
            check_steps_left(state, loader, in_steps)

    def make() -> RunFolder:
        return open_run(config.output, stage, config.resume, settings, data=data, check_change=check_change)

    opened = run_on_main(accelerator, make)
    with opened or nullcontext(), ExitStack() as stack:
        folder, changes = broadcast_from_main(accelerator, (opened.path, opened.changes) if opened else (Path(), []))
        yield Run(folder, changes, stage, config, settings, opened, accelerator, stack)


@dataclass
class Run:
    """An open run; see :func:`start_run`.

    Attributes:
        folder: the same on all processes.
        changes: how configuration or data differ from those of the run that is continued, a sentence each.
        main: whether this is the main process, which alone writes and speaks.
        loggers: silent before :meth:`start`, and on rank > 0.
        progress: of the whole run.
    """

    folder: Path
    changes: list[str]
    _stage: str
    _config: RunConfig
    _settings: dict[str, Any]
    _opened: RunFolder | None
    _accelerator: Accelerator
    _stack: ExitStack

    def __post_init__(self) -> None:
        self.main, self.loggers = self._opened is not None, LoggerCollection(None, [])
        self.progress = Progress(0, 0, self.main, self._config.tracking.progress)
        self._steps_before = 0  # of stage two's loops that are over

    def checkpoints(
        self, loader: TrainLoader, in_steps: bool, name: str = ""
    ) -> tuple[Checkpoints, dict[str, Any] | None]:
        """A loop's checkpoints and the last one of them, from which its loader then continues.

        ``in_steps``: whether the loop's length is given in optimizer steps, rather than in epochs. ``name``: of the loop's folder,
        where the run has several.

        Raises:
            ConfigError: processes read checkpoints of different steps; on all of them.
        """
        every = self._config.save_every.on(loader.clock(0)) or None
        checkpoints = Checkpoints(self.folder / "checkpoints" / name, every, self._config.save_total_limit, self.main)
        resume = checkpoints.load()
        starts = all_gather_objects(self._accelerator, int(resume["done"]) if resume else 0)
        if len(set(starts)) > 1:
            raise ConfigError(
                f"the processes read checkpoints of different steps ({', '.join(map(str, starts))}): they need one `output` that all "
                "machines see alike, such as a folder on a shared disk."
            )
        if resume is not None:
            loader.resume(resume["position"], resume["done"], in_steps)
        return checkpoints, resume

    def start(self, last_step: int, total: int = 0, checkpoints: Checkpoints | None = None) -> None:
        """Opens the loggers and the progress bar, and answers signals from now on.

        Args:
            last_step: the last one whose metrics stay in the log, -1 for none; the run repeats what comes later.
            total: steps of a run with one loop.
            checkpoints: of that loop: the run waits for a write under way before it ends.
        """
        enter, before = self._stack.enter_context, seconds_before(self.folder) if self.main else 0.0
        if checkpoints is not None:
            enter(checkpoints)
        if total:
            mode = self._config.tracking.progress
            self.progress = enter(Progress(total, max(last_step, 0), self.main, mode, seconds_before=before))
        tracking = self._config.tracking
        self.loggers = enter(open_loggers(self._opened, self._stage, self._settings, tracking, last_step))
        enter(handle_signals(self.folder if self.main else None))

    def say(self, text: str) -> None:
        self.progress.say(text)

    def log_loop(self) -> Callback:
        """Logs the one loop of a run by its steps."""
        return _LoopLogger(self.progress, self.loggers.log)

    @contextmanager
    def logging(self, seed: int, name: str, total: int, done: int) -> Iterator[tuple[Callback, int]]:
        """Logs one of the loops of stage two, and shows its progress; gives a callback, and the steps between two logs.

        A seed's metrics stand in the log by seed. Those of its loops do, too, and count the optimizer steps of all loops of the run
        in ``finetune/step``, one axis that never goes back. A loop that continues after ``done`` steps drops the later lines.
        """
        before = self._steps_before
        if done < total:  # of a loop that was at its end, the next one knows what is repeated
            self.loggers.truncate_training(before + done)

        def log(step: int, metrics: Mapping[str, float]) -> None:
            own = {name: value for name, value in metrics.items() if name.startswith("finetune/")}
            self.loggers.log(seed, {TRAINING_STEP: before + step, **own})

        title = f"seed {seed}, {name.replace('_', ' ')}"
        with Progress(total, done, self.main, self._config.tracking.progress, title) as progress:
            yield _LoopLogger(progress, log), max(1, total // _POINTS)
        self._steps_before = before + total

    def count_trained(self, seeds: Collection[int]) -> None:
        """Counts the steps of seeds that were done before, by the log."""
        if seeds and (self.folder / FILE_NAME).exists():
            lines = [line for line in read_metrics(self.folder) if line["step"] in seeds]
            self._steps_before = max((line.get(TRAINING_STEP, 0) for line in lines), default=0)


class _LoopLogger(Callback):
    """Hands metrics to the loggers, and every step to the progress bar."""

    def __init__(self, progress: Progress, log: Callable[[int, Mapping[str, float]], None]) -> None:
        self._progress, self._log = progress, log

    def on_step_end(self, done: int) -> None:
        self._progress.moved(done)

    def on_log(self, done: int, metrics: Mapping[str, float]) -> None:
        self._log(done, metrics)
        self._progress.update(done, metrics)
