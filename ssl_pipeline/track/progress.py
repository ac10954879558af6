"""What a person sees while a run goes on: one bar in a terminal, plain lines in a batch system's log."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

_SECONDS_BETWEEN_LINES = 10.0
_console = Console(highlight=False, soft_wrap=True)


def console() -> Console:
    """The one console."""
    return _console


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people; the first column is text, the others are figures."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    _console.print(table)


class Progress:
    """The progress of a run.

    Args:
        total: steps of the run.
        start: steps done before.
        enabled: whether this process speaks.
    """

    def __init__(self, total: int, start: int = 0, enabled: bool = True) -> None:
        self._total, self._start, self._enabled = total, start, enabled
        self._latest: dict[str, float] = {}
        self._began, self._last_line = time.monotonic(), 0.0
        self._bar = Bar(
            MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
            console=_console, disable=not (enabled and _console.is_terminal), transient=True,
        )  # fmt: skip
        self._row = self._bar.add_task("", total=total, completed=start, figures="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line, above the bar."""
        if self._enabled:
            _console.print(text, markup=False)

    def update(self, done: int, figures: Mapping[str, float]) -> None:
        """``done`` steps are done."""
        self._latest.update({name.rpartition("/")[2]: value for name, value in figures.items()})
        line = self._line()
        self._bar.update(self._row, completed=done, figures=line)
        due = time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES or done == self._total
        if not _console.is_terminal and due:
            self._last_line = time.monotonic()
            self.say(f"step {done}/{self._total}  {line}  {self._left(done)}")

    def _left(self, done: int) -> str:
        elapsed = time.monotonic() - self._began
        seconds = elapsed / max(1, done - self._start) * (self._total - done)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"

    def _line(self) -> str:
        shown = {
            "loss": "loss {:.3f}", "lr": "lr {:.2g}", "temperature": "τ {:.3g}", "images_per_s": "{:,.0f} img/s",
            "knn": "kNN {:.1%}", "effective_rank": "rank {:.0f}",
        }  # fmt: skip
        return "  ".join(text.format(self._latest[name]) for name, text in shown.items() if name in self._latest)
