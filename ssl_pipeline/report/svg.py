"""Drawings for the page: matplotlib's SVG, in the page's own colors and fonts."""

from __future__ import annotations

import io
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from ssl_pipeline.evaluation.plots import to_unit_square
from ssl_pipeline.report.charts import Chart, Line, Point

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from torch import Tensor

# Colors as matplotlib writes them; the page replaces them by its own, which follow the light or dark theme.
_INK, _GRID, _RUN, _CLASS = "#c0de00", "#c0de01", "#c0df", "#c0e0"
_COLORS = 256
_SMOOTHED_FROM = 60  # points from which a running mean is drawn over the raw line
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 9, "axes.linewidth": 0.8, "axes.edgecolor": _GRID, "grid.color": _GRID,
    "grid.linewidth": 0.8, "xtick.color": _INK, "ytick.color": _INK, "text.color": _INK, "xtick.major.size": 0,
    "ytick.major.size": 0, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
}  # fmt: skip


def draw_chart(chart: Chart, axis: str) -> Markup:
    """A chart over ``step``, ``epoch`` or ``time``, or over its own axis; empty where none of its points has such a place."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    column = {"epoch": 1, "time": 2}.get(axis, 0)
    lines = [
        (number, line, [p for p in line.points if p[column] is not None]) for number, line in enumerate(chart.lines)
    ]
    values = [v for *_, points in lines for p in points for v in (p.value, p.low, p.high) if v is not None]
    if not values:
        return Markup("")
    log = chart.log if chart.log is not None else min(values) > 0 and max(values) > 100 * min(values)
    log = log and max(values) > 0
    longest = max(float(p[column] or 0) for *_, points in lines for p in points)
    unit, name = 1.0, axis
    if axis == "time":
        unit, name = (1.0, "seconds") if longest < 120 else (60.0, "minutes") if longest < 7200 else (3600.0, "hours")

    def draw(axes: Axes) -> None:
        if log:
            axes.set_yscale("log", nonpositive="mask")
        for number, line, points in lines:
            _draw_line(axes, line, number, chart.smooth, [float(p[column] or 0) / unit for p in points], points)
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        if not log:
            axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value, chart.unit)))
        axes.set_xlabel(name, loc="right", fontsize=8, color=_INK, labelpad=2)

    return _svg(f"{chart.key} {axis}", f"{chart.title} over {name}", (4.4, 2.6), (0.13, 0.17, 0.85, 0.8), draw)


def draw_map(
    key: str, plane: Tensor, labels: Sequence[int] | None, thumbnails: Sequence[Image.Image], name: str
) -> Markup:
    """Features in the plane: a dot an image in its class's color, and over it the thumbnails that hide no other one."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    def draw(axes: Axes) -> None:
        places, classes = to_unit_square(plane).tolist(), labels or [-1] * len(plane)
        for label in sorted(set(classes)):
            color = _class_color(label)
            x, y = zip(*(place for place, own in zip(places, classes, strict=True) if own == label), strict=True)
            axes.scatter(x, y, s=14, linewidths=0, color=color, alpha=0.75, gid=f"class-{label}")
        shown = list[list[float]]()
        for place, label, image in zip(places, classes, thumbnails, strict=True):
            if all(max(abs(place[0] - x), abs(place[1] - y)) > 0.11 for x, y in shown):
                shown.append(place)
                style = {"edgecolor": _class_color(label), "facecolor": _class_color(label), "linewidth": 0}
                picture = OffsetImage(np.asarray(image), zoom=20 / max(image.size))
                box = AnnotationBbox(picture, (place[0], place[1]), pad=0.12, bboxprops=style)
                box.set_gid(f"class-{label}")
                axes.add_artist(box)
        axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)

    return _svg(key, name, (6.4, 4.8), (0, 0, 1, 1), draw)


def written(value: float, unit: str) -> str:
    """A value for people: a share in percent, a large number with its thousands."""
    if unit == "percent":
        return f"{100 * value:.3g} %"
    if unit == "count" and abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _draw_line(axes: Axes, line: Line, number: int, smoothed: bool, places: list[float], points: list[Point]) -> None:
    """Gaps stay gaps; a long line is smoothed, and the raw one stays behind it."""
    color = f"{_RUN}{(number if line.run is None else line.run) % 8:02x}"
    gid = None if line.run is None else f"run-{line.run}"
    values = [math.nan if p.value is None else p.value for p in points]
    style: dict[str, Any] = {"color": color, "gid": gid, "solid_joinstyle": "round"}
    if smoothed and len(values) >= _SMOOTHED_FROM:
        axes.plot(places, values, linewidth=0.8, alpha=0.35, **style)
        values = smooth(values, 1 - 1 / max(2.0, len(values) / 40))
    axes.plot(places, values, linewidth=1.6, marker="o" if len(values) <= 12 else "", markersize=4, **style)
    for place, p in zip(places, points, strict=True):
        if p.low is not None and p.high is not None:
            axes.plot([place, place], [p.low, p.high], linewidth=1.6, **style)


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """An exponential mean whose start is not pulled to 0; a gap stays a gap."""
    found, mean, mass = list[float](), 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            mean, mass = weight * mean + (1 - weight) * value, weight * mass + (1 - weight)
        found.append(mean / mass if math.isfinite(value) else math.nan)
    return found


def _class_color(label: int) -> str:
    return f"{_RUN}00" if label < 0 else f"{_CLASS}{label % _COLORS:02x}"


def _svg(key: str, label: str, size: tuple[float, float], area: tuple[float, float, float, float], draw: Any) -> Markup:
    """Draws into an SVG element whose classes and colors the page's style sheet knows; ``key`` keeps its ids apart from others'."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=size, facecolor="none")
        axes = figure.add_axes(area, facecolor="none")
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = re.sub(r'id="((?:run|class)--?\d+)"', r'class="\1"', text[text.index("<svg") :])
    text = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        lambda found: f'<svg {found[1]} role="img" aria-label="{escape(label)}">',
        text,
        count=1,
    )
    text = re.sub(f"{_RUN}(..)", lambda found: f"var(--run-{int(found[1], 16)})", text)
    text = re.sub(f"{_CLASS}(..)", lambda found: f"var(--class-{int(found[1], 16)})", text)
    return Markup(text.replace(_INK, "var(--muted)").replace(_GRID, "var(--grid)"))
