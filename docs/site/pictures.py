"""``python -m docs.site.pictures``: the glossary's drawings, by the code that they explain; the same bytes each time."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from docs.site.verbs import ROOT
from ssl_pipeline.losses.temperature import softmax
from ssl_pipeline.schedules import warmup_cosine

INK, BLUE, ORANGE = "#333333", "#4477aa", "#ee7733"


def temperature() -> Figure:
    """The softmax of 1, 2, 3 at three temperatures."""
    figure, logits = (
        Figure(figsize=(7.5, 2.6), layout="constrained"),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
    )
    for axes, tau in zip(figure.subplots(1, 3, sharey=True), (2.0, 1.0, 0.5), strict=True):
        values = softmax(logits, tau).tolist()
        axes.bar(["1", "2", "3"], values, color=BLUE)
        for place, value in enumerate(values):
            axes.text(place, value + 0.02, f"{value:.2f}", ha="center")
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


def gap() -> Figure:
    """Three channels of three by three values, and the mean of each."""
    figure = Figure(figsize=(7.5, 2.4), layout="constrained")
    maps = torch.tensor(
        [[[1, 0, 2], [3, 9, 1], [0, 1, 1]], [[4, 4, 5], [4, 5, 5], [4, 5, 9]], [[0, 0, 0], [0, 0, 8], [0, 8, 2]]]
    )
    for axes, channel in zip(figure.subplots(1, 3), maps.float(), strict=True):
        _blank(axes, (-0.2, 5.6), (-0.9, 3.2))
        for row in range(3):
            for column in range(3):
                value = float(channel[row, column])
                axes.add_patch(
                    Rectangle((column, 2 - row), 1, 1, facecolor=BLUE, alpha=0.1 + value / 12, edgecolor="white")
                )
                axes.text(column + 0.5, 2.5 - row, f"{value:.0f}", ha="center", va="center")
        axes.annotate("", (4.3, 1.5), (3.15, 1.5), arrowprops={"arrowstyle": "->", "color": INK})
        axes.add_patch(Rectangle((4.4, 1), 1, 1, facecolor=ORANGE, alpha=0.5, edgecolor="white"))
        axes.text(4.9, 1.5, f"{channel.mean():.0f}", ha="center", va="center", weight="bold")
        axes.text(1.5, -0.5, "a channel", ha="center")
        axes.text(4.9, -0.5, "its mean", ha="center")
    return figure


def bottleneck() -> Figure:
    """Widths from the features to the classes: much narrower in between."""
    figure = Figure(figsize=(6.5, 2.6), layout="constrained")
    axes = figure.subplots()
    _blank(axes, (-0.3, 4.6), (-2.9, 2.9))
    layers = [(0.0, 2.3, "512 features"), (2.0, 0.5, "bottleneck: 64"), (4.0, 1.0, "10 classes")]
    for (left, height, _), (right, next_height, _) in pairwise(layers):
        corners = [
            (left + 0.15, height),
            (right - 0.15, next_height),
            (right - 0.15, -next_height),
            (left + 0.15, -height),
        ]
        axes.add_patch(Polygon(corners, facecolor=BLUE, alpha=0.2))
    for place, height, label in layers:
        axes.add_patch(
            Rectangle((place - 0.15, -height), 0.3, 2 * height, facecolor=ORANGE if "neck" in label else BLUE)
        )
        axes.text(place, -height - 0.2, label, ha="center", va="top")
    return figure


PICTURES = {"temperature": temperature, "warm_up": warm_up, "gap": gap, "bottleneck": bottleneck}


def draw(folder: Path) -> None:
    """Writes every drawing as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in PICTURES.items():
        with mpl.rc_context(
            {"svg.hashsalt": "ssl_pipeline", "svg.fonttype": "none", "font.size": 11, "text.color": INK}
        ):
            picture().savefig(folder / f"{name}.svg", metadata={"Date": None}, facecolor="white")


def _blank(axes: Axes, width: tuple[float, float], height: tuple[float, float]) -> None:
    axes.set(xlim=width, ylim=height, aspect="equal" if width[1] > 5 else "auto")
    axes.axis("off")


if __name__ == "__main__":
    draw(ROOT / "docs" / "glossary")
