"""What stage one knows of its encoder while it learns: figures, the best one so far, and pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ssl_pipeline.config.base import first_line
from ssl_pipeline.engine.failures import LostProcessError
from ssl_pipeline.engine.signals import StoppedError
from ssl_pipeline.evaluation.best import BestEncoder
from ssl_pipeline.evaluation.online import OnlineEvaluation
from ssl_pipeline.evaluation.pictures import ImageLogger
from ssl_pipeline.models.artifact import Card
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.schedules import TrainProgress

_log = logging.getLogger("ssl_pipeline")


class OnlineEvalCallback:
    """Looks at the encoder whenever the loop asks for it.

    Args:
        encoder: which learns.
        evaluation: takes its figures.
        best: keeps it where it is better than before.
        gallery: draws what was looked at.
        card: what is written beside an encoder of such figures.
        total: steps of the run; at the last one pictures are drawn whatever they cost.
        hand_over: writes the encoder, before anything is measured of it at the end: a figure or a picture that fails must not lose it.
        alone: whether there is no other process, which would wait for the rest of an evaluation that failed here.

    Attributes:
        done: the steps that were done at the last look.
        latest: the figures of the last look; empty before the first, and after one that failed.
    """

    def __init__(
        self,
        encoder: Encoder,
        evaluation: OnlineEvaluation,
        best: BestEncoder,
        gallery: ImageLogger,
        card: Callable[[dict[str, float]], Card],
        total: int,
        hand_over: Callable[[], None],
        alone: bool,
    ) -> None:
        self._encoder, self._evaluation, self._best, self._gallery = encoder, evaluation, best, gallery
        self._card, self._total, self._hand_over, self._alone = card, total, hand_over, alone
        self.done, self.latest = -1, dict[str, float]()

    def __call__(self, clock: TrainProgress) -> dict[str, float]:
        """The figures after a step; none, and a warning, where they can't be taken."""
        return self.look(clock.taken + 1)

    def look(self, done: int) -> dict[str, float]:
        """The same after ``done`` steps.

        Raises:
            StoppedError: a signal has come.
            LostProcessError: another process was killed or hangs.
            Exception: the evaluation failed, and other processes wait for it.
        """
        self.done, self.latest = done, {}
        if done == self._total:
            self._hand_over()
        try:
            figures = self._evaluation(self._encoder)
            self._best.offer(self._encoder, self._card(figures), done)
            self._gallery.evaluation(done, self._evaluation, must=done == self._total)
        except (StoppedError, LostProcessError):
            raise
        except Exception as error:
            if not self._alone:
                raise
            saved = "The encoder is saved, without figures." if done == self._total else "Training goes on."
            _log.warning(
                "the evaluation after step %d failed (%s: %s). %s", done, type(error).__name__, first_line(error), saved
            )
            return {}
        self.latest = figures
        return figures
