"""``python -m docs.site.drawings``: the glossary's charts, drawn with the code that they explain; the same bytes each time."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from docs.site.reference import ROOT
from ssl_pipeline.losses.temperature import softmax
from ssl_pipeline.schedules import warmup_cosine

BLUE, ORANGE = "#4477aa", "#ee7733"


def temperature() -> Figure:
    """The softmax of 1, 2, 3 at three temperatures."""
    figure, logits = Figure(figsize=(7.5, 2.6), layout="constrained"), torch.tensor([1.0, 2.0, 3.0]).double()
    for axes, tau in zip(figure.subplots(1, 3, sharey=True), (2.0, 1.0, 0.5), strict=True):
        bars = axes.bar(["1", "2", "3"], softmax(logits, tau).tolist(), color=BLUE)
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.set(title=f"τ = {tau:g}", ylim=(0, 1), xlabel="logit")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def warm_up() -> Figure:
    """The learning rate's factor over a run of a hundred steps, ten of them warm-up."""
    figure = Figure(figsize=(5.5, 2.6), layout="constrained")
    axes = figure.subplots()
    factors = [warmup_cosine(step, 100, 10, 0.0, 0.0) for step in range(101)]
    axes.plot(range(11), factors[:11], color=ORANGE, linewidth=2.5, label="warm-up: 10 % of the run")
    axes.plot(range(10, 101), factors[10:], color=BLUE, linewidth=2.5, label="cosine decay")
    axes.set(xlabel="optimizer step", ylabel="share of the learning rate", ylim=(0, 1.05), xlim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def draw(folder: Path) -> None:
    """Writes every chart as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(
        {"svg.hashsalt": "ssl_pipeline", "svg.fonttype": "none", "font.size": 11, "text.color": "#333333"}
    ):
        for chart in (temperature, warm_up):
            chart().savefig(folder / f"{chart.__name__}.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    draw(ROOT / "docs" / "glossary")
