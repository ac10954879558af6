"""The picture of a study: the figure against the number of labels, a panel for each regime, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ssl_pipeline.metrics.interval import interval
from ssl_pipeline.study.verdict import Condition, StudyTable, named

# Okabe and Ito's colors, told apart by people with any kind of color vision; marks and dashes say the same in black and white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKS = "osD^vP"
_FRESH = "#555555"


def draw(findings: StudyTable, files: Sequence[Path]) -> None:
    """Saves the picture, as each file's ending says."""
    from matplotlib.figure import Figure

    regimes = list(dict.fromkeys(regime for _, regime in findings.conditions if regime != "scratch")) or ["scratch"]
    picture = Figure(figsize=(0.6 + 3.9 * len(regimes), 3.9), layout="constrained")
    axes = picture.subplots(1, len(regimes), sharey=True, squeeze=False)[0]
    scale = 100 if findings.in_percent else 1
    pretrained = [name for name in findings.config.initializations if findings.config.initializations[name] != "random"]
    places = {labels: findings.count(labels) for labels in findings.labels}
    for panel, regime in zip(axes, regimes, strict=True):
        # What is trained from fresh weights stands in each panel of what is trained, to compare with.
        shown = [c for c in findings.conditions if c[1] == regime or (c[1] == "scratch" and regime != "frozen")]
        for nth, condition in enumerate(shown):
            fresh = condition[0] not in pretrained
            index = 0 if fresh else pretrained.index(condition[0])
            values = [interval(findings.values(condition, labels)) for labels in findings.labels]
            panel.errorbar(
                # Moved aside a little, so that intervals do not hide one another.
                [places[labels] * 1.03 ** (nth - (len(shown) - 1) / 2) for labels in findings.labels],
                [scale * value.mean for value in values],
                [0 if value.half == float("inf") else scale * value.half for value in values],
                label=_label(condition), capsize=3, linewidth=1.6, markersize=6,
                color=_FRESH if fresh else _COLORS[index % len(_COLORS)],
                marker="x" if fresh else _MARKS[index % len(_MARKS)], linestyle="--" if fresh else "-",
            )  # fmt: skip
        panel.set(title=regime, xscale="log", xlabel="labeled images")
        panel.set_xticks(
            list(places.values()), [f"{count}\n{named(labels)}" for labels, count in places.items()], fontsize=8
        )
        panel.minorticks_off()
        panel.grid(axis="y", linewidth=0.4, alpha=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False, loc="best")
    if findings.in_percent:  # an interval of few seeds may reach beyond what a share can be
        low, high = axes[0].get_ylim()
        axes[0].set_ylim(max(low, 0), min(high, 100))
    split = next(iter(findings.rows))["split"]
    axes[0].set_ylabel(f"{findings.figure} on {split}{' (%)' if findings.in_percent else ''}")
    for file in files:
        picture.savefig(file, dpi=160, metadata={"Date": None} if file.suffix == ".svg" else None)


def _label(condition: Condition) -> str:
    name = condition[0].replace("$", r"\$")  # a formula to matplotlib
    return f"{name}, scratch" if condition[1] == "scratch" else name
