"""A run in a few plain sentences: what it was, how long it took, and what it found."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from ssl_pipeline.metrics import collapse
from ssl_pipeline.metrics.interval import Interval, interval
from ssl_pipeline.report.comparison import Comparison, study_comparison
from ssl_pipeline.report.curves import first_and_last, last
from ssl_pipeline.report.read import RunRecord
from ssl_pipeline.report.stage_two import in_percent, seeds_of, shown, spoken, title_of


def summary(run: RunRecord) -> list[str]:
    """The sentences of one run."""
    found = {"pretrain": _pretrain, "finetune": _finetune, "study": _study}[run.stage](run)
    return [sentence for sentence in found if sentence]


def _pretrain(run: RunRecord) -> list[str]:
    backbone, data = run.named("backbone"), run.named("data")
    what = f"{_pretext(run)} {'trains' if run.state == 'running' else 'trained'} {backbone or 'a backbone'}"
    steps = max((line["step"] for line in run.lines), default=0)
    how_long = f" for {steps:,} steps" if steps else ""
    took = f" in {duration(run.seconds)}" if run.seconds and run.state != "running" else ""
    so_far = {"finished": "", "running": " so far", "stopped": ", and was stopped before its end"}[run.state]
    return [f"{what} on {data or 'images'}{how_long}{took}{so_far}.", _knn(run), _collapse(run)]


def _pretext(run: RunRecord) -> str:
    """The pretext task as the field writes it: its module's first words."""
    name = run.named("pretext")
    try:
        told = importlib.import_module(name if "." in name else f"ssl_pipeline.pretext.{name or '_'}").__doc__ or ""
    except ImportError:
        told = ""
    return told.partition(":")[0] if ":" in told else name or "Pretraining"


def _knn(run: RunRecord) -> str:
    measured = first_and_last(run, "knn")
    if measured is None:
        return "Without labels nobody knows its kNN accuracy." if last(run, "feature_std") is not None else ""
    before, after = measured
    points = 100 * (after - before)
    verb = "rose" if points > 0.05 else "fell" if points < -0.05 else "stayed"
    if verb == "stayed":
        return f"kNN accuracy on dev stayed at {100 * after:.1f} %."
    return f"kNN accuracy on dev {verb} from {100 * before:.1f} % untrained to {100 * after:.1f} %."


def _collapse(run: RunRecord) -> str:
    figures = {name: last(run, name) for name in ("feature_std", "effective_rank")}
    std, rank = figures["feature_std"], figures["effective_rank"]
    if std is None or rank is None:
        return ""
    told = collapse.verdict({"feature_std": std, "effective_rank": rank}, width=None)
    return told or f"The features did not collapse: std {std:.2f}, effective rank {rank:.0f}."


def _finetune(run: RunRecord) -> list[str]:
    rows = seeds_of(run)
    title = title_of(run)
    start = "from random weights" if _starts_fresh(run) else "from pretrained weights"
    if not rows:
        return [f"{title[:1].upper()}{title[1:]} {start}: nothing is measured yet."]
    name, percent = next(iter(rows[0])), in_percent(run)
    value = interval([row[name] for row in rows if name in row])
    seeds = f"{len(rows)} seeds" if len(rows) > 1 else "one seed, which says nothing of chance"
    unit = " %" if percent else ""
    split = run.results.get("split", "the held-out split")
    return [
        f"{title[:1].upper()}{title[1:]} {start}: {spoken(name)} on {split} {shown(value, percent)}{unit} over {seeds}."
    ]


def _study(run: RunRecord) -> list[str]:
    found = study_comparison(run)
    told = run.study.get("conclusion")
    left_out = run.study.get("left_out")
    missing = [f"{name} was left out: {why}" for name, why in left_out.items()] if isinstance(left_out, dict) else []
    if isinstance(told, list) and told:
        return [*map(str, told), *missing]
    if found is None:
        return ["Its figures are in its own table, study.json." if run.study else "The study has measured nothing yet."]
    return [*conclusion(found), *missing]


def conclusion(found: Comparison) -> list[str]:
    """The claimed condition against the baseline, in words; no gain means that the interval contains 0."""
    told = found.headline()
    if told is None:
        return [f"{len(found.values)} condition(s) are measured so far."]
    return [f"{told[0]} against {found.baseline}: {verdict(told[1], found.percent)}"]


def verdict(difference: Interval, percent: bool = True) -> str:
    """A paired difference in words."""
    points = shown(difference, percent, signed=True) + (" points" if percent else "")
    if difference.half == float("inf"):
        return f"{points} with one seed, which says nothing of chance."
    finding = "a gain" if difference.low > 0 else "no gain beyond chance"
    if difference.mean + difference.half < 0:
        finding = "a loss"
    return f"{points} (95 % interval, paired by seed): {finding}."


def duration(seconds: float | None) -> str:
    """Such as ``2 min 10 s``."""
    if seconds is None:
        return "—"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    parts: Sequence[tuple[int, str]] = ((hours, "h"), (minutes, "min"), (rest, "s"))
    shown_parts = [f"{count} {unit}" for count, unit in parts if count]
    return " ".join(shown_parts[:2]) or "0 s"


def _starts_fresh(run: RunRecord) -> bool:
    return run.config.get("initialization") == "random" or run.named("regime") == "scratch"
