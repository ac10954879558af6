"""From runs to one HTML file that needs nothing else: no network, no server, no script."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from ssl_pipeline.config.compose import as_yaml
from ssl_pipeline.logging.run import versions
from ssl_pipeline.report import summary, tables
from ssl_pipeline.report.charts import Chart, label_efficiency, logged, spectra
from ssl_pipeline.report.images import RunImages, run_images
from ssl_pipeline.report.read import RunRecord
from ssl_pipeline.report.svg import draw_chart, written

_PANELS = {
    "curves": "Curves", "stage-two": "Stage two", "temperature": "Temperature", "collapse": "Collapse", "map": "Map",
    "neighbors": "Neighbors", "views": "Views", "domains": "Domains", "settings": "Settings", "system": "System",
}  # fmt: skip


def page(runs: Sequence[RunRecord], refresh: int = 0, images: Callable[[RunRecord], RunImages] = run_images) -> str:
    """The report on one run, or several side by side, which reloads itself after so many seconds (0 for never)."""
    found = [images(run) for run in runs]
    spectrum = [(number, one.spectrum) for number, one in enumerate(found) if one.spectrum]
    drawn = [_chart(chart, runs) for chart in [*logged(runs), *spectra(spectrum), *label_efficiency(runs)]]
    stage_two, seen = _stage_two(runs), _seen(runs, found)
    confusions = [one for run in runs if run.stage == "finetune" and (one := tables.confusion(run))]
    domains = [table for run in runs if (table := tables.domain_table(run))]
    shown = {chart["panel"] for chart in drawn} | {"settings", "system"}
    shown |= {key for key in ("views", "neighbors", "map") if any(entry[key] for entry in seen)}
    shown |= {"stage-two"} if stage_two or confusions else set()
    shown |= {"domains"} if domains else set()
    stages = [run.stage for run in runs]
    # The environment escapes whatever the names and settings of a run hold, so that no cell can forget it.
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_asset("page.html.j2"))
    return template.render(
        title=summary.title(runs), overview=summary.overview(runs), version=versions()["ssl-pipeline"], refresh=refresh,
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"), style=Markup(_asset("page.css")),
        charts=drawn, runs=[_run(run, of_run) for run, of_run in zip(runs, found, strict=True)], glance=summary.glance(runs),
        curve_runs=sorted({number for chart in drawn for number in chart["runs"]}), looks=seen, stage_two=stage_two,
        panels=[(key, name) for key, name in _PANELS.items() if key in shown], confusions=confusions, domains=domains,
        difference=tables.difference(runs), system=tables.system(runs), alike=len(set(stages)) < len(stages),
        over_steps=any("step" in chart["drawings"] for chart in drawn),
        several_looks=sum(bool(entry["map"] or entry["neighbors"]) for entry in seen) > 1,
        class_names=max((one.map["classes"] for one in found if one.map), key=len, default=[]),
    )  # fmt: skip


def _asset(name: str) -> str:
    return (files("ssl_pipeline.report") / name).read_text(encoding="utf-8")


def _chart(chart: Chart, runs: Sequence[RunRecord]) -> dict[str, Any]:
    """A chart's drawings by axis, and above them the last value of each line; of a spectrum the first."""
    values = []
    for number, line in enumerate(chart.lines):
        known = [point.value for point in line.points if point.value is not None]
        if known:
            name = line.name or (runs[line.run].name if line.run is not None else "")
            value = known[0] if chart.axis in ("direction", "dimension") else known[-1]
            color = (number if line.run is None else line.run) % 8
            values.append({"name": name, "value": written(value, chart.unit), "color": color, "run": line.run})
    axes = [chart.axis] if chart.axis else ["step", "epoch", "time"]
    return {
        "key": chart.key, "panel": chart.panel, "title": chart.title, "help": chart.help, "values": values,
        "runs": [line.run for line in chart.lines if line.run is not None], "drawings": {axis: draw_chart(chart, axis) for axis in axes},
    }  # fmt: skip


def _run(run: RunRecord, images: RunImages) -> dict[str, Any]:
    return {
        "name": run.name, "state": run.state, "summary": summary.summary(run), "notes": [*run.notes, *images.notes],
        "config": as_yaml(run.config) if run.config else "config.yaml can't be read.",
    }  # fmt: skip


def _seen(runs: Sequence[RunRecord], images: Sequence[RunImages]) -> list[dict[str, Any]]:
    """What there is to see of each run; views that several runs share stand once, under the first of them."""
    entries: list[dict[str, Any]] = []
    for number, (run, found) in enumerate(zip(runs, images, strict=True)):
        entry = {"index": number, "name": run.name, "views_of": [run.name], **vars(found)}
        same = next((other for other in entries if found.views and other["views"] == found.views), None)
        if same is not None:
            same["views_of"].append(run.name)
            entry["views"] = None
        entries.append(entry)
    return entries


def _stage_two(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The tables of stage two, those of comparisons first."""
    compared = [*(summary.study_comparison(run) for run in runs if run.stage == "study"), summary.runs_comparison(runs)]
    measured = [tables.results_table(run) for run in runs if run.stage == "finetune"]
    return [*(_with_bars(one) for one in compared if one), *(asdict(table) for table in measured if table)]


def _with_bars(found: summary.Comparison) -> dict[str, Any]:
    """A comparison's table for the page, with each condition's interval as a mark on one scale."""
    means = map(found.mean, found.values)
    ends = [(one.low, one.mean, one.high) if math.isfinite(one.half) else (one.mean,) * 3 for one in means]
    low, high = min(low for low, *_ in ends), max(high for *_, high in ends)
    room = max((high - low) * 0.08, 0.01 if found.percent else abs(high) * 0.01 + 1e-9)
    low, high = low - room, high + room
    if found.percent:
        low, high = max(0.0, low), min(1.0, high)
    places = [[round(100 * (min(high, max(low, v)) - low) / (high - low), 2) for v in three] for three in ends]
    bars = [(start, middle, round(end - start, 2)) for start, middle, end in places]
    scale = (f"{100 * low:.0f}", f"{100 * high:.0f} %") if found.percent else (f"{low:.3g}", f"{high:.3g}")
    return {**asdict(found.table()), "bars": bars, "scale": scale}
