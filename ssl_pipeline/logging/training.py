"""Stage two while it trains: its loops, one after another, as one curve in the log and a bar in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ssl_pipeline.logging.jsonl import FILE_NAME, TRAINING_STEP, read_metrics
from ssl_pipeline.logging.logger import LoggerCollection
from ssl_pipeline.logging.progress import Mode, Progress

_POINTS = 50  # of a loop


class LoopLogger(NamedTuple):
    """What hears a loop.

    Attributes:
        figures: is given the steps done, and figures.
        moved: is given the steps done, at each of them.
    """

    figures: Callable[[int, Mapping[str, float]], None]
    moved: Callable[[int], None]


class TrainingCurves:
    """Hears the loops of a stage-two run: probe and training of each seed.

    A seed's own figures come by seed. What its loops log is a line of that seed, too, and counts the optimizer steps of all the
    run's loops in ``finetune/step``: one axis that never goes back, whatever the number of seeds. A loop that goes on from
    a checkpoint drops the lines from after it, and repeats them.

    Args:
        trackers: of the run; silent in all processes but the main one.
        mode: of the terminal.
        speaks: whether this process speaks.
        before: steps of the loops of seeds that were done before.
    """

    def __init__(self, trackers: LoggerCollection, mode: Mode, speaks: bool, before: int = 0) -> None:
        self._trackers, self._mode, self._speaks = trackers, mode, speaks
        self._before = before  # steps of the loops that are over

    @contextmanager
    def loop(self, seed: int, name: str, total: int, done: int) -> Iterator[LoopLogger]:
        """What hears one loop.

        Args:
            seed: of the training.
            name: of the loop.
            total: its steps.
            done: how many of them were done before.
        """
        before = self._before
        if done < total:  # of a loop that was at its end, the next one knows what is repeated
            self._trackers.truncate_training(before + done)
        title = f"seed {seed}, {name.replace('_', ' ')}"
        with Progress(total, done, self._speaks, self._mode, title) as progress:

            def hear(step: int, figures: Mapping[str, float]) -> None:
                progress.update(step, figures)
                own = {name: value for name, value in figures.items() if name.startswith("finetune/")}
                self._trackers.log(seed, {TRAINING_STEP: before + step, **own})

            yield LoopLogger(hear, progress.moved)
        self._before = before + total

    def say(self, text: str) -> None:
        """One line, of what is done between two loops."""
        Progress(0, enabled=self._speaks, mode=self._mode).say(text)

    @staticmethod
    def log_every(total: int) -> int:
        """Steps between two logs of a loop."""
        return max(1, total // _POINTS)


def trained_steps(folder: Path, seeds: Collection[int]) -> int:
    """The optimizer steps that a run has done for some of its seeds, by its log; 0 where there is none."""
    if not seeds or not (folder / FILE_NAME).exists():
        return 0
    return max((line.get(TRAINING_STEP, 0) for line in read_metrics(folder) if line["step"] in seeds), default=0)
