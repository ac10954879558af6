"""The console: a progress bar in a terminal, plain lines in a batch system's log, and tables."""

from __future__ import annotations

import io
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, ParamSpec, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

P = ParamSpec("P")
T = TypeVar("T")
Mode = Literal["auto", "rich", "plain", "quiet"]
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_UNSAID = 5.0  # what took no longer than this the last time is not announced
_SHOWN = {
    "loss": "loss {:.3f}", "lr": "lr {:.2g}", "tau": "{tau} {:.3g}", "images_per_s": "{:,.0f} img/s",
    "epoch": "epoch {:.1f}", "data_wait": "wait {:.0%}", "knn": "kNN {:.1%}", "effective_rank": "rank {:.0f}",
    "validation_accuracy": "validation {:.1%}",
}  # fmt: skip
_NO_TIME_LEFT = "-:-- left"
_WAITS_LONG, _WAITS_OFTEN = 0.2, 3
_OF_EVALUATION = ("knn", "effective_rank")
_console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)  # a folder may be named [b] or :x:


def console() -> Console:
    """The console on standard output; it shows file names that are no UTF-8 escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    return _console


def silence_other_ranks(main: bool) -> None:
    """Silences warnings, those of libraries too, on all ranks but 0."""
    if not main:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)


def duration(seconds: float) -> str:
    """Such as ``1:02:03``, or ``2:03`` below an hour."""
    whole = round(seconds)
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; its first column is text, the others are numbers."""
    table = Table(title=Text(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    if _console.is_terminal:
        _console.print(table)
        return
    # A log file has no width: a wide table keeps its last digits there.
    wanted = _console.measure(table, options=_console.options.update(max_width=10_000)).maximum
    Console(highlight=False, width=max(_console.width, wanted)).print(table)


class Progress:
    """The progress of a run, or of the loop ``title`` of a run with several; earlier starts took ``seconds_before``."""

    def __init__(
        self, total_steps: int, start_step: int = 0, enabled: bool = True, mode: Mode = "auto", title: str = "",
        seconds_before: float = 0.0,
    ) -> None:  # fmt: skip
        self._total, self._done, self._title = total_steps, start_step, title
        self._enabled = enabled and mode != "quiet"
        self._terminal = mode == "rich" or (mode == "auto" and _console.is_terminal)
        self._began = time.monotonic() - seconds_before
        self._tau = "τ" if _console.encoding.startswith("utf") else "tau"
        self._latest: dict[str, float] = {}
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._waits = 0
        self._took: dict[str, float] = {}
        self._last_line, self._said = -math.inf, start_step
        titles = [TextColumn("{task.description}", markup=False)] if title else []
        self._bar = Bar(
            *titles, MofNCompleteColumn(), BarColumn(20), TextColumn("{task.fields[figures]}", markup=False),
            TimeElapsedColumn(), TextColumn("{task.fields[left]}", markup=False),
            console=_console, disable=not (self._enabled and self._terminal), transient=True,
        )  # fmt: skip
        self._row = self._bar.add_task(title, total=total_steps, completed=start_step, figures="", left=_NO_TIME_LEFT)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._done != self._said:  # a run that was stopped ends between two lines
            self._say_step()

    def say(self, text: str) -> None:
        """Prints a line, above the bar."""
        if self._enabled:
            encoding = _console.encoding  # a log in ASCII must not stop a run for a character that it can't show
            _console.print(text.encode(encoding, "replace").decode(encoding), markup=False)

    def say_end(self, figures: Mapping[str, float], before: Mapping[str, float]) -> None:
        """Prints the run's steps, time and metrics as a table, beside the metrics of the untrained model."""
        if not self._enabled:
            return
        seconds = time.monotonic() - self._began
        rows = [["steps", f"{self._done:,}"], ["time, evaluations included", duration(seconds)]]
        rows += [["loss, last logged", f"{self._latest['loss']:.4g}"]] if "loss" in self._latest else []
        rows = [[name, "", value] for name, value in rows]
        for name, value in figures.items():
            untrained = f"{before[name]:.4g}" if name in before else ""
            rows.append([name.rpartition("/")[2].replace("_", " "), untrained, f"{value:.4g}"])
        print_table("pretrained", ["metric", "untrained", "now"], rows)

    def announcing(self, what: str, work: Callable[P, T]) -> Callable[P, T]:
        """Work that prints what it is before it starts, unless it took only a few seconds the last time."""

        def announced(*words: P.args, **named: P.kwargs) -> T:
            took = self._took.get(what)
            if took is None or took > _SECONDS_UNSAID:
                self.say(f"  {what}" + ("" if took is None else f", about {duration(took)}"))
            began = time.monotonic()
            try:
                return work(*words, **named)
            finally:
                self._took[what] = time.monotonic() - began

        return announced

    def moved(self, step: int) -> None:
        """``step`` steps are done; called at each of them, and once before the first, to start the clock."""
        now, self._done = time.monotonic(), step
        self._first = self._first or (step, now)
        self._bar.update(self._row, completed=step, left=self._left() or _NO_TIME_LEFT)
        since = max(self._last_line, self._first[1])
        if not self._terminal and now - since >= _SECONDS_BETWEEN_LINES:
            self._say_step()

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        self._done = step
        self._first = self._first or (step, time.monotonic())
        for name, value in figures.items():
            group, _, figure = name.rpartition("/")
            if group != "eval" or figure in _OF_EVALUATION:  # an evaluation's loss is not the step's
                self._latest[figure] = value
                if figure == "data_wait":
                    self._watch_wait(value)
        self._bar.update(self._row, completed=step, figures=self._line(), left=self._left() or _NO_TIME_LEFT)
        due = time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._total
        if due and not self._terminal:
            self._say_step()

    def _watch_wait(self, share: float) -> None:
        """Says once that the model waits for data: after three such logs in a row, since the first is the workers' start."""
        self._waits = self._waits + 1 if share > _WAITS_LONG or self._waits >= _WAITS_OFTEN else 0
        if self._waits == _WAITS_OFTEN:
            self.say(
                f"{share:.0%} of the time of the last steps went into waiting for data. Of files: raise `num_workers` if there are "
                "cores left, or decode them once with `ssl-pipeline prepare FOLDER --cache PIXELS` and set `data.cache=true`."
            )

    def _say_step(self) -> None:
        self._last_line, self._said = time.monotonic(), self._done
        parts = [self._title, f"step {self._done}/{self._total}", self._line(), self._left()]
        self.say("  ".join(part for part in parts if part))

    def _line(self) -> str:
        return "  ".join(
            text.format(self._latest[name], tau=self._tau) for name, text in _SHOWN.items() if name in self._latest
        )

    def _left(self) -> str:
        """Time left at the mean speed, evaluations included; empty before there is one, and at the end."""
        began, at = self._first or (self._done, 0.0)
        if self._done <= began or self._done >= self._total:
            return ""
        return f"{duration((time.monotonic() - at) / (self._done - began) * (self._total - self._done))} left"
