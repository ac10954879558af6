"""Alerts: a loss that jumps, features that collapse."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median

from ssl_pipeline.engine.loop import Callback
from ssl_pipeline.engine.run import Run
from ssl_pipeline.logging.jsonl import read_metrics
from ssl_pipeline.metrics.collapse import verdict

_WINDOW, _FEWEST = 50, 20
_NORMAL = 1.4826  # the standard deviation of normal noise, from its median absolute deviation
_TIMES = 8.0
_LEAST_SHARE = 0.02  # a loss that hardly moves has no spread worth the name


class LossSpikes:
    """A loss far above those before it, by their median and median absolute deviation.

    It reads the logged losses, on the main process alone, and is rebuilt from the log when a run continues: it costs a step
    nothing and has no state to save. A jump is reported once, until the loss is back.

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
            "there, lower `optim.lr`, lengthen `optim.warmup` or set `optim.grad_clip_norm`, and continue from an earlier checkpoint."
        )


class Alerts(Callback):
    """Tells the terminal and the loggers when the loss jumps or the features collapse.

    Args:
        run: gives both, and the losses that it has logged before.
        prefix: group of the step's own metrics.
        width: of the features.
    """

    def __init__(self, run: Run, prefix: str, width: int) -> None:
        self._run, self._loss, self._width = run, f"{prefix}/loss", width
        lines = read_metrics(run.folder) if run.main else []
        losses = [line[self._loss] for line in lines if self._loss in line]
        self._spikes = LossSpikes(losses[-_WINDOW:])

    def on_log(self, done: int, metrics: Mapping[str, float]) -> None:
        jump = self._spikes(metrics[self._loss]) if self._loss in metrics else None
        if jump is not None:
            self._alert(done, "loss spike", jump)
        measured = {name.removeprefix("eval/"): value for name, value in metrics.items() if name.startswith("eval/")}
        collapsed = verdict(measured, self._width)
        if collapsed is not None:
            self._alert(done, "collapse", collapsed)

    def _alert(self, step: int, title: str, text: str) -> None:
        self._run.say(text)
        self._run.loggers.alert(step, title, text)
