"""What pretraining did to the kNN accuracy on ``dev``, in words: a difference that chance explains is no gain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ssl_pipeline.logging.jsonl import FILE_NAME, read_metrics

_ERRORS = 2.0  # standard errors of the difference


def untrained_figures(folder: Path) -> dict[str, float]:
    """The figures that a run logged before its first step, under the names of later ones; empty where there are none."""
    if not (folder / FILE_NAME).exists():
        return {}
    lines = (line for line in read_metrics(folder) if line["step"] == 0)
    return {
        f"eval/{name.removeprefix('untrained/')}": value
        for line in lines
        for name, value in line.items()
        if name.startswith("untrained/")
    }


def without_gain(untrained: Mapping[str, float], final: Mapping[str, float], images: int) -> str | None:
    """A sentence where pretraining has not raised the kNN accuracy beyond chance; None where it has, or nobody knows.

    Chance is two standard errors of the difference of two shares, each of ``images`` images: sqrt((p(1 - p) + q(1 - q)) / n), with one
    success and one failure added to each share (Agresti and Caffo 2000), so that 100 % of a few images is not certain. Both are
    measured on the same images, so that this is rather too wide than too narrow.

    Args:
        untrained: the figures before the first step.
        final: those at the end.
        images: how many images kNN was measured on.
    """
    before, after = untrained.get("eval/knn"), final.get("eval/knn")
    if before is None or after is None or images < 1:
        return None
    spread = [share * (1 - share) for share in ((value * images + 1) / (images + 2) for value in (before, after))]
    noise = _ERRORS * (sum(spread) / (images + 2)) ** 0.5
    if after - before > noise:
        return None
    found = f"kNN on dev was {100 * before:.1f} % before the first step and is {100 * after:.1f} % now"
    judged = f"({images} images: a difference of up to {100 * noise:.1f} points is chance, two standard errors)"
    if before - after > noise:
        return f"Pretraining made the features worse: {found} {judged}. Lower `optim.lr`, or check that the views suit the images."
    return f"Pretraining moved nothing that can be measured: {found} {judged}. Train longer, on more images, or measure on more."
