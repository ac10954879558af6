"""From runs to one HTML file that needs nothing else: no network, no server, no second file."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from jinja2 import Environment, Template
from markupsafe import Markup

from ssl_pipeline.config.compose import as_yaml
from ssl_pipeline.logging.run import versions
from ssl_pipeline.metrics.interval import interval
from ssl_pipeline.report import settings, stage_two
from ssl_pipeline.report.comparison import Comparison, runs_comparison, study_comparison
from ssl_pipeline.report.curves import charts, first_and_last, last
from ssl_pipeline.report.look import RunImages, run_images
from ssl_pipeline.report.overview import overview, title
from ssl_pipeline.report.read import RunRecord
from ssl_pipeline.report.spread import label_efficiency, spectra
from ssl_pipeline.report.summary import duration, summary

_PANELS = {
    "curves": "Curves", "stage-two": "Stage two", "temperature": "Temperature", "collapse": "Collapse", "map": "Map",
    "neighbors": "Neighbors", "views": "Views", "domains": "Domains", "settings": "Settings", "system": "System",
}  # fmt: skip
_SCRIPTS = ("state.js", "chart.js", "map.js", "page.js")


def page(runs: Sequence[RunRecord], refresh: int = 0, looking: Callable[[RunRecord], RunImages] = run_images) -> str:
    """The report.

    Args:
        runs: one, or several side by side.
        refresh: seconds after which the page reloads itself; 0 for never.
        looking: gives what there is to see of a run.
    """
    looks = [(number, run, looking(run)) for number, run in enumerate(runs)]
    drawn = [*charts(runs), *spectra(looks), *label_efficiency(runs)]
    tables = _stage_two(runs)
    seen = _seen(looks)
    confusions = [found for run in runs if run.stage == "finetune" and (found := stage_two.confusion(run))]
    domains = [asdict(table) for run in runs if (table := stage_two.domain_table(run))]
    shown = {chart["panel"] for chart in drawn} | {"settings", "system"}
    shown |= {key for key in ("views", "neighbors", "map") if any(entry[key] for entry in seen)}
    shown |= {"stage-two"} if tables or confusions else set()
    shown |= {"domains"} if domains else set()
    curve_runs = sorted({line["run"] for chart in drawn for line in chart["lines"] if "run" in line})
    stages = [run.stage for run in runs]
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return _template().render(
        title=title(runs), overview=overview(runs), made=made, version=versions()["ssl-pipeline"], refresh=refresh,
        style=Markup(_asset("page.css")), script=_script(), data=_data(runs, drawn, seen, refresh), charts=drawn,
        runs=[_run(run, of_run) for _, run, of_run in looks], glance=_glance(runs),
        curve_runs=[(number, runs[number].name) for number in curve_runs],
        panels=[(key, name) for key, name in _PANELS.items() if key in shown], looks=seen, stage_two=tables,
        confusions=confusions, domains=domains, difference=settings.difference(runs), system=settings.system(runs),
        over_steps=any("axis" not in chart for chart in drawn), alike=len(set(stages)) < len(stages),
        several_looks=sum(bool(entry["map"] or entry["neighbors"]) for entry in seen) > 1,
    )  # fmt: skip


def _template() -> Template:
    # Escaping whatever the names and settings of a run hold is the environment's, so no cell can forget it.
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_asset("page.html.j2"))


def _asset(name: str) -> str:
    return (files("ssl_pipeline.report") / name).read_text(encoding="utf-8")


def _script() -> Markup:
    return Markup('(() => {\n"use strict";\n' + "\n".join(map(_asset, _SCRIPTS)) + "\n})();")


def _data(runs: Sequence[RunRecord], drawn: list[dict[str, Any]], seen: list[dict[str, Any]], refresh: int) -> Markup:
    """What the script draws, as JSON that no text in it can end before its end."""
    maps = [{**entry["map"], "index": entry["index"]} for entry in seen if entry["map"]]
    tree = {
        "runs": [run.name for run in runs], "charts": drawn, "maps": maps, "refresh": refresh,
        "classes": max((len(found["classes"]) for found in maps), default=0),
    }  # fmt: skip
    text = json.dumps(tree, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _run(run: RunRecord, of_run: RunImages) -> dict[str, Any]:
    return {
        "name": run.name, "state": run.state, "summary": summary(run), "notes": [*run.notes, *of_run.notes],
        "config": as_yaml(run.config) if run.config else "config.yaml can't be read.",
    }  # fmt: skip


def _seen(looks: Sequence[tuple[int, RunRecord, RunImages]]) -> list[dict[str, Any]]:
    """What there is to see of each run; views that several runs share stand once, under the first of them."""
    entries: list[dict[str, Any]] = []
    for number, run, found in looks:
        same = next((entry for entry in entries if found.views and entry["views"] == found.views), None)
        if same is not None:
            same["views_of"].append(run.name)
        entries.append({
            "index": number, "name": run.name, "views": found.views if same is None else None, "views_of": [run.name],
            "neighbors": found.neighbors, "map": found.map,
        })  # fmt: skip
    return entries


def _stage_two(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The tables of stage two, those of comparisons first."""
    compared = [*(study_comparison(run) for run in runs if run.stage == "study"), runs_comparison(runs)]
    measured = [stage_two.results_table(run) for run in runs if run.stage == "finetune"]
    return [
        *(_with_bars(found) for found in compared if found is not None),
        *({**asdict(table), "bars": None} for table in measured if table is not None),
    ]


def _with_bars(found: Comparison) -> dict[str, Any]:
    """A comparison's table for the page, with each condition's interval as a mark on one scale."""
    means = [found.mean(name) for name in found.values]
    halves = [0.0 if value.half == float("inf") else value.half for value in means]
    low = min(value.mean - half for value, half in zip(means, halves, strict=True))
    high = max(value.mean + half for value, half in zip(means, halves, strict=True))
    room = max((high - low) * 0.08, 0.01 if found.percent else abs(high) * 0.01 + 1e-9)
    low, high = low - room, high + room
    if found.percent:
        low, high = max(0.0, low), min(1.0, high)

    def place(value: float) -> float:
        return round(100 * (min(high, max(low, value)) - low) / (high - low), 2)

    bars = [
        (place(value.mean - half), place(value.mean), round(place(value.mean + half) - place(value.mean - half), 2))
        for value, half in zip(means, halves, strict=True)
    ]
    scale = (f"{100 * low:.0f}", f"{100 * high:.0f} %") if found.percent else (f"{low:.3g}", f"{high:.3g}")
    return {**asdict(found.table()), "bars": bars, "scale": scale}


def _glance(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    """The figures that a reader looks for first, of a single stage-one run and what followed it."""
    stage_one = [run for run in runs if run.stage == "pretrain"]
    if len(stage_one) != 1:
        return []
    run, items = stage_one[0], list[dict[str, str]]()

    def add(name: str, value: str, note: str = "") -> None:
        items.append({"name": name, "value": value, "note": note})

    if knn := first_and_last(run, "knn"):
        add("kNN on dev", f"{100 * knn[1]:.1f} %", f"{100 * (knn[1] - knn[0]):+.1f} points over untrained")
    for study in runs:
        found = study_comparison(study) if study.stage == "study" else None
        if found and (told := found.headline()):
            gain = stage_two.shown(told[1], found.percent, signed=True)
            value = stage_two.shown(found.mean(told[0]), found.percent) + (" %" if found.percent else "")
            add("Stage two", value, f"{told[0]}: {gain} against {found.baseline}")
        elif study.stage == "finetune" and (rows := stage_two.seeds_of(study)):
            name, percent = next(iter(rows[0])), stage_two.in_percent(study)
            value = stage_two.shown(interval([row[name] for row in rows if name in row]), percent)
            add(
                "Stage two", value + (" %" if percent else ""), f"{stage_two.spoken(name)}, {stage_two.title_of(study)}"
            )
    if rank := last(run, "effective_rank"):
        add("Effective rank", f"{rank:.0f}", f"feature std {last(run, 'feature_std') or 0:.2f}")
    if loss := last(run, "loss", step_only=True):
        add("Loss", f"{loss:.3g}")
    if run.seconds:
        speed = last(run, "images_per_s")
        add("Time", duration(run.seconds), f"{speed:,.0f} images/s" if speed else "")
    return items
