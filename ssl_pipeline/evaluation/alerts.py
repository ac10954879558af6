"""What a person should hear of at once: a loss that jumps, features that collapse."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median

from ssl_pipeline.logging.jsonl import read_metrics
from ssl_pipeline.logging.logger import LoggerCollection
from ssl_pipeline.logging.progress import Progress
from ssl_pipeline.metrics.collapse import verdict

_WINDOW, _FEWEST = 50, 20
_NORMAL = 1.4826  # the standard deviation of normal noise, from its median absolute deviation
_TIMES = 8.0
_LEAST_SHARE = 0.02  # a loss that hardly moves has no spread worth the name


class LossSpikes:
    """A loss far above those before it, by their median and median absolute deviation.

    It looks at the losses that are logged, on the main process alone, and is made anew from the log when a run is continued:
    so it costs a step nothing, and has no state to save. One jump is told once, until the loss is back.

    Args:
        before: losses logged before, the last ones last.
    """

    def __init__(self, before: Iterable[float] = ()) -> None:
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._up = False
        for loss in before:
            self(loss)

    def __call__(self, loss: float) -> str | None:
        """A sentence if this loss has jumped."""
        usual = median(self._losses) if self._losses else loss
        spread = _NORMAL * median(abs(one - usual) for one in self._losses) if self._losses else 0.0
        limit = usual + _TIMES * max(spread, _LEAST_SHARE * abs(usual))
        was_up, self._up = self._up, len(self._losses) >= _FEWEST and not loss <= limit
        if loss < float("inf"):
            self._losses.append(loss)
        if not self._up or was_up:
            return None
        return (
            f"The loss has jumped to {loss:.4g}; the last {len(self._losses)} logged were around {usual:.4g}. If it stays "
            "there, lower `optim.lr`, lengthen `optim.warmup` or set `optim.clip`, and continue from an earlier checkpoint."
        )


class Alerts:
    """Listens to the figures of a run, and says what is wrong with them.

    Args:
        prefix: group of the step's own figures.
        width: of the features.
        tell: is given the step, a title, and a sentence.
        before: losses logged before.
    """

    def __init__(
        self, prefix: str, width: int, tell: Callable[[int, str, str], None], before: Iterable[float] = ()
    ) -> None:
        self._loss, self._width, self._tell, self._spikes = f"{prefix}/loss", width, tell, LossSpikes(before)

    def __call__(self, done: int, figures: Mapping[str, float]) -> None:
        """``done`` steps are done."""
        jump = self._spikes(figures[self._loss]) if self._loss in figures else None
        if jump is not None:
            self._tell(done, "loss spike", jump)
        measured = {name.removeprefix("eval/"): value for name, value in figures.items() if name.startswith("eval/")}
        collapsed = verdict(measured, self._width)
        if collapsed is not None:
            self._tell(done, "collapse", collapsed)


def open_alerts(prefix: str, width: int, progress: Progress, trackers: LoggerCollection, logged: Path | None) -> Alerts:
    """Alerts that are told in the terminal and to the mirrors.

    Args:
        prefix: group of the step's own figures.
        width: of the features.
        progress: the terminal.
        trackers: the mirrors.
        logged: the folder of a run that goes on, whose log holds losses from before; None for a new one.
    """

    def tell(step: int, title: str, text: str) -> None:
        progress.say(text)
        trackers.alert(step, title, text)

    lines = read_metrics(logged) if logged is not None else []
    losses = [line[f"{prefix}/loss"] for line in lines if f"{prefix}/loss" in line]
    return Alerts(prefix, width, tell, losses[-_WINDOW:])
