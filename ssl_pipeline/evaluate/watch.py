"""What stage one knows of its encoder while it learns: figures, the best one so far, and pictures."""

from __future__ import annotations

from collections.abc import Callable

from ssl_pipeline.evaluate.best import BestEncoder
from ssl_pipeline.evaluate.online import OnlineEvaluation
from ssl_pipeline.evaluate.pictures import Gallery
from ssl_pipeline.model.artifact import Card
from ssl_pipeline.model.encoder import Encoder
from ssl_pipeline.schedules import Clock


class Watch:
    """Looks at the encoder whenever the loop asks for it.

    Args:
        encoder: which learns.
        evaluation: takes its figures.
        best: keeps it where it is better than before.
        gallery: draws what was looked at.
        card: what is written beside an encoder of such figures.
        total: steps of the run; at the last one pictures are drawn whatever they cost.

    Attributes:
        latest: the figures of the last look; empty before the first.
    """

    def __init__(
        self,
        encoder: Encoder,
        evaluation: OnlineEvaluation,
        best: BestEncoder,
        gallery: Gallery,
        card: Callable[[dict[str, float]], Card],
        total: int,
    ) -> None:
        self._encoder, self._evaluation, self._best, self._gallery = encoder, evaluation, best, gallery
        self._card, self._total = card, total
        self.latest: dict[str, float] = {}

    def __call__(self, clock: Clock) -> dict[str, float]:
        """The figures after a step."""
        done = clock.step + 1
        self.latest.update(self._evaluation(self._encoder))
        self._best.offer(self._encoder, self._card(self.latest), done)
        self._gallery.evaluation(done, self._evaluation, must=done == self._total)
        return self.latest
