"""Stage one's evaluation while it runs: kNN accuracy on ``val``, signs of collapse, alerts, and the best encoder. Never the test set."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, first_line
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.engine.failures import LostProcessError
from ssl_pipeline.engine.loop import Callback
from ssl_pipeline.engine.run import Run
from ssl_pipeline.engine.signals import StoppedError
from ssl_pipeline.evaluation.features import extract, extract_readable, two_views
from ssl_pipeline.evaluation.plots import ImageLogger
from ssl_pipeline.logging.jsonl import FILE_NAME, read_metrics
from ssl_pipeline.metrics import collapse
from ssl_pipeline.metrics.knn import knn_accuracy
from ssl_pipeline.models.encoder import Card, Encoder, finite, read, save, write_card
from ssl_pipeline.rng import permutation
from ssl_pipeline.schedules import TrainProgress
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing

_WINDOW, _FEWEST = 50, 20
_NORMAL = 1.4826  # the standard deviation of normal noise, from its median absolute deviation
_TIMES = 8.0
_LEAST_SHARE = 0.02  # a loss that hardly moves has no spread worth the name
Seen = tuple[IndexedDataset, Tensor, Tensor]
_FEW_IMAGES = 32  # fewer give signs of collapse that say more about their number than about the features
_FEWEST_FOR_RANK = 8
_ERRORS = 2.0  # standard errors of a difference that chance explains
_log = logging.getLogger("ssl_pipeline")


class OnlineEvaluation:
    """kNN accuracy on ``val`` where labels exist, and signs of collapse always.

    Signs of collapse need no held-out images: where ``val`` has only a few, training images are taken.

    Up to ``bank_size`` training images with labels are the bank of kNN, and up to ``sample`` images show signs of collapse; two views
    of an image give alignment.

    Attributes:
        seen: a source, the numbers of the images that were evaluated last, and their features (N, D): pictures are drawn of them.
    """

    def __init__(
        self,
        train: IndexedDataset,
        val: IndexedDataset | None,
        views: Views,
        preprocessing: Preprocessing,
        share: DistInfo,
        k: int = 20,
        bank_size: int = 10_000,
        sample: int = 512,
    ) -> None:
        self._train, self._val, self._views, self._k = train, val, views, k
        self._preprocessing, self._share = preprocessing, share
        bank = permutation(len(train), "online evaluation", "bank")
        if train.labels is not None:
            bank = bank[train.labels[bank] >= 0]  # −1: this image has no label to vote with
        self._bank = bank[:bank_size].sort().values
        labels = val.labels if val is not None else None
        self._queries = (labels >= 0).nonzero()[:, 0] if labels is not None else torch.arange(0)
        self._looked_at = val if val is not None and len(val) >= min(_FEW_IMAGES, len(train)) else train
        self._sample = permutation(len(self._looked_at), "online evaluation", "sample")[:sample].sort().values
        self.seen: Seen | None = None

    @torch.no_grad()
    def __call__(self, encoder: Encoder) -> dict[str, float]:
        """Metrics of an encoder: ``eval/knn``, ``eval/feature_std``, ``eval/effective_rank`` and others.

        Each one is finite; what can't be measured, such as kNN without a labeled image, is absent.
        """
        figures = self._collapse(encoder)
        if self.knn_images:
            figures["knn"] = self._knn(encoder)
        return finite({f"eval/{name}": value for name, value in figures.items()})

    @property
    def knn_images(self) -> int:
        """How many images kNN is measured on: those of ``val`` with a label; 0 where no training image has one."""
        return len(self._queries) if self._train.labels is not None and len(self._bank) else 0

    def _knn(self, encoder: Encoder) -> float:
        train, val = self._train, self._val
        assert train.labels is not None
        assert val is not None
        assert val.labels is not None
        assert val.classes is not None
        bank, voting = extract_readable(encoder, train, self._preprocessing, self._share, self._bank)
        queries, asked = extract_readable(encoder, val, self._preprocessing, self._share, self._queries)
        return knn_accuracy(queries, val.labels[asked], bank, train.labels[voting], len(val.classes), self._k)

    def _collapse(self, encoder: Encoder) -> dict[str, float]:
        features = extract(encoder, self._looked_at, self._preprocessing, self._share, self._sample)
        self.seen = self._looked_at, self._sample, features
        first, second = two_views(encoder, self._looked_at, self._views, self._share.device, self._sample[:128])
        figures = {"feature_std": collapse.feature_std(features)}
        if len(features) >= _FEWEST_FOR_RANK:
            figures["effective_rank"] = collapse.effective_rank(features)
        aligned, uniform = collapse.alignment(first, second), collapse.uniformity(features)
        return {**figures, "alignment": aligned, "uniformity": uniform}


class OnlineEvalCallback(Callback):
    """Evaluates the encoder every so many steps, keeps the best one, draws pictures, and hands the encoder over at the end.

    ``card`` is what is written beside an encoder of such metrics. ``alone`` says that no other process would wait for the rest of an
    evaluation that failed here.
    """

    def __init__(
        self,
        run: Run,
        encoder: Encoder,
        evaluation: OnlineEvaluation,
        card: Callable[[dict[str, float]], Card],
        every: int,
        total: int,
        alone: bool,
    ) -> None:
        self._run, self._encoder, self._evaluation, self._card = run, encoder, evaluation, card
        self.evaluate_every, self._total, self._alone = every, total, alone
        self._best = BestEncoder(run.folder / "best", "eval/knn", run.main, comparable=not run.changes)
        self._images = ImageLogger(run.loggers)
        self._measure = run.progress.announcing("measuring the backbone", evaluation)
        self._done, self._latest, self._untrained = -1, dict[str, float](), dict[str, float]()

    def before_training(self, done: int, images: IndexedDataset, views: ViewsConfig, seed: int) -> None:
        """Evaluates the untrained encoder, unless ``done`` steps were taken before, and draws images with their views."""
        self._untrained = {} if done else self._measure(self._encoder)
        untrained = {f"untrained/{name.removeprefix('eval/')}": value for name, value in self._untrained.items()}
        self._run.loggers.log(done, untrained)
        if self._run.loggers.draws:
            self._run.say("  drawing pictures of views and features")
        self._images.views(done, images, views, seed)
        self._images.evaluation(done, self._evaluation.seen, must=True)

    def evaluate(self, progress: TrainProgress) -> dict[str, float]:
        return self._evaluate(progress.taken + 1)

    def finish(self) -> None:
        """Writes the card with the last metrics, and prints them beside those of the untrained encoder."""
        # A run that was at its end before took no step.
        final = self._latest if self._done == self._total else self._evaluate(self._total)
        if not self._run.main:
            return
        write_card(self._run.folder, self._card(final))
        self._run.loggers.log_model(self._run.folder)
        untrained = self._untrained or untrained_metrics(self._run.folder)
        self._run.progress.say_end(final, untrained)
        if verdict := without_gain(untrained, final, self._evaluation.knn_images):
            self._run.say(verdict)

    def _evaluate(self, done: int) -> dict[str, float]:
        """Metrics after ``done`` steps; none, and a warning, where the evaluation fails in a single process.

        Raises:
            StoppedError: a signal has come.
            LostProcessError: another process was killed or hangs.
            Exception: the evaluation failed, and other processes wait for it.
        """
        self._done, self._latest = done, {}
        if done == self._total and self._run.main:  # first: a metric or a picture that fails must not lose the encoder
            self._run.say(f"wrote {save(self._run.folder, self._encoder, self._card({}))} and card.json")
        try:
            metrics = self._measure(self._encoder)
            self._best.update(self._encoder, self._card(metrics), done)
            self._images.evaluation(done, self._evaluation.seen, must=done == self._total)
        except (StoppedError, LostProcessError):
            raise
        except Exception as error:
            if not self._alone:
                raise
            saved = "The encoder is saved, without metrics." if done == self._total else "Training goes on."
            _log.warning(
                "the evaluation after step %d failed (%s: %s). %s", done, type(error).__name__, first_line(error), saved
            )
            return {}
        self._latest = metrics
        return metrics


class BestEncoder:
    """The encoder that scored best, in a folder that is used like a finished run's: ``finetune encoder=RUN/best``.

    The folder's card is the memory: a run that continues from before its best step comes to the same metric again, and the folder
    has that encoder already. It counts where it is ``comparable``: measured as those to come will be.
    """

    def __init__(self, folder: Path, metric: str, main: bool = True, comparable: bool = True) -> None:
        self._folder, self._metric, self._main = folder, metric, main
        self._value = float("-inf")
        if main and comparable and folder.is_dir():
            # An unreadable one is that of a process which was killed when it wrote its first.
            with contextlib.suppress(ConfigError, KeyError):
                self._value = read(folder, "encoder")[0].figures[metric]

    def update(self, encoder: Encoder, card: Card, done: int) -> None:
        """Keeps the encoder after ``done`` steps if it is better than all before; the earliest of equals."""
        value = card.figures.get(self._metric)
        if not self._main or value is None or not value > self._value:
            return
        self._value = value
        self._folder.mkdir(exist_ok=True)
        save(self._folder, encoder, card.model_copy(update={"figures": card.figures | {"step": float(done)}}))


def untrained_metrics(folder: Path) -> dict[str, float]:
    """The metrics that a run logged before its first step, under the names of later ones; empty where there are none."""
    if not (folder / FILE_NAME).exists():
        return {}
    found: dict[str, float] = {}
    for line in read_metrics(folder):
        if line["step"] == 0:
            found |= {name: value for name, value in line.items() if name.startswith("untrained/")}
    return {f"eval/{name.removeprefix('untrained/')}": value for name, value in found.items()}


def without_gain(untrained: Mapping[str, float], final: Mapping[str, float], images: int) -> str | None:
    """A sentence where pretraining has not raised the kNN accuracy beyond chance; None where it has, or where there is no kNN accuracy.

    Chance is two standard errors of the difference of two shares, each of ``images`` images: sqrt((p(1 - p) + q(1 - q)) / n), with one
    success and one failure added to each share (Agresti and Caffo 2000), so that 100 % of a few images is not certain. Both are
    measured on the same images, so that this is rather too wide than too narrow.
    """
    before, after = untrained.get("eval/knn"), final.get("eval/knn")
    if before is None or after is None or images < 1:
        return None
    spread = [share * (1 - share) for share in ((value * images + 1) / (images + 2) for value in (before, after))]
    noise = _ERRORS * (sum(spread) / (images + 2)) ** 0.5
    if after - before > noise:
        return None
    found = f"kNN on val was {100 * before:.1f} % before the first step and is {100 * after:.1f} % now"
    judged = f"({images} images: a difference of up to {100 * noise:.1f} points is chance, two standard errors)"
    if before - after > noise:
        return f"Pretraining made the features worse: {found} {judged}. Lower `optim.lr`, or check that the views suit the images."
    return f"Pretraining moved nothing that can be measured: {found} {judged}. Train longer, on more images, or measure on more."


class LossSpikes:
    """A loss far above those before it, by their median and median absolute deviation.

    It reads the logged losses, on the main process alone, and is rebuilt from the log when a run continues: it costs a step
    nothing and has no state to save. A jump is reported once, until the loss is back.
    """

    def __init__(self, before: Iterable[float] = ()) -> None:
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._up = False
        for loss in before:
            self(loss)

    def __call__(self, loss: float) -> str | None:
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
    """Tells the terminal and the loggers when the loss (of a group of metrics) jumps or the features (of a width) collapse."""

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
        collapsed = collapse.verdict(measured, self._width)
        if collapsed is not None:
            self._alert(done, "collapse", collapsed)

    def _alert(self, step: int, title: str, text: str) -> None:
        self._run.say(text)
        self._run.loggers.alert(step, title, text)
