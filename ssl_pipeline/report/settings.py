"""How runs were set up: the settings in which they differ, and what they ran on."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Sequence
from typing import Any

from ssl_pipeline.config.base import flatten
from ssl_pipeline.report.read import RunRecord
from ssl_pipeline.report.stage_two import Table
from ssl_pipeline.report.summary import duration

_ABSENT = "—"


def difference(runs: Sequence[RunRecord]) -> Table | None:
    """The keys whose values differ, side by side; a stage's runs are compared among themselves only."""
    rows: list[list[str]] = []
    for stage in ("pretrain", "finetune", "study"):
        flat = {
            run.name: {key: _written(value) for key, value in flatten(run.config).items()}
            for run in runs
            if run.stage == stage
        }
        if len(flat) < 2:
            continue
        for key in sorted({key for values in flat.values() for key in values}):
            values = [flat[run.name].get(key, _ABSENT) if run.name in flat else "" for run in runs]
            if len({value for run, value in zip(runs, values, strict=True) if run.name in flat}) > 1:
                rows.append([key, *values])
    if not rows:
        return None
    return Table("Settings that differ", ["key", *(run.name for run in runs)], rows)


def system(runs: Sequence[RunRecord]) -> Table:
    """What each run ran on, of a continued one at its last start: command, commit, device, threads, versions; and times."""
    facts = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for of_run in facts for name in of_run))
    rows = [[name, *(of_run.get(name, _ABSENT) for of_run in facts)] for name in names]
    return Table("System", ["", *(run.name for run in runs)], rows)


def _facts(run: RunRecord) -> dict[str, str]:
    start = run.starts[-1] if run.starts else {}
    versions = start.get("versions")
    facts = {
        "folder": str(run.folder),
        "state": run.state,
        "started": _when(run.began),
        "duration": duration(run.seconds),
        "starts": str(len(run.starts)),
        "device": str(start.get("device") or "not recorded"),
        "threads": str(start.get("threads", _ABSENT)),
        "commit": str(start.get("commit") or _ABSENT)[:12],
        "command": _command(start.get("command")),
    }
    return facts | ({str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {})


def _command(found: Any) -> str:
    """As it is typed; earlier versions kept a list of words."""
    return shlex.join(map(str, found)) if isinstance(found, list) and found else str(found or _ABSENT)


def _when(seconds: float | None) -> str:
    if seconds is None:
        return _ABSENT
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _written(value: Any) -> str:
    """As YAML has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
