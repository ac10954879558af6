"""Reads run folders: whatever is there, and sentences about what is missing or broken."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ssl_pipeline.config.base import ConfigError, UserError, first_line
from ssl_pipeline.config.compose import read_yaml
from ssl_pipeline.config.schema import component
from ssl_pipeline.evaluation.result import is_share
from ssl_pipeline.logging.jsonl import FILE_NAME, read_metrics
from ssl_pipeline.logging.lock import is_held

Stage = Literal["pretrain", "finetune", "study"]
State = Literal["finished", "running", "stopped"]
CONFIG = "config.yaml"


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder holds: its ``config.yaml``, the starts of ``run.json``, the lines of ``metrics.jsonl``, and JSON files.

    Attributes:
        name: for people; unique on a page.
        state: ``running`` while a process holds the folder, ``finished`` with its last file written, ``stopped`` otherwise.
        card: its ``card.json``, as ``results``, ``study`` and ``domain`` are those files; empty where there is none.
        notes: what is missing or broken, for the page.
    """

    folder: Path
    name: str
    stage: Stage
    state: State
    config: dict[str, Any]
    starts: list[dict[str, Any]] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    card: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    study: dict[str, Any] = field(default_factory=dict)
    domain: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def named(self, group: str) -> str:
        """The name of a component of its configuration, such as ``backbone``; empty where there is none."""
        tree = self.config.get(group)
        return str(tree.get("name", "")) if isinstance(tree, dict) else ""

    @property
    def steps(self) -> int:
        """The last step that was logged; of stage two, the number of the last seed."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def seeds(self) -> list[dict[str, float]]:
        """A stage-two run's metrics, seed by seed; what is no number is left out."""
        figures = self.results.get("figures")
        return [found for row in figures if (found := numbers(row))] if isinstance(figures, list) else []

    @property
    def first_seed(self) -> int:
        seed = self.config.get("seed", 0)
        return seed if isinstance(seed, int) else 0

    @property
    def in_percent(self) -> bool:
        """Whether a stage-two run's metrics are shares."""
        try:
            task = component("downstream", "downstream", self.config.get("downstream", {}))
        except UserError:
            return all(0 <= value <= 1 for row in self.seeds for name, value in row.items() if is_share(name, True))
        return bool(getattr(task, "in_percent", False))

    @property
    def seconds(self) -> float | None:
        """From the first start to the last metric or file; None where neither is known."""
        began = self.began
        ends = [float(line["time"]) for line in self.lines[-1:] if isinstance(line.get("time"), int | float)]
        if not ends and self.state == "finished":
            ends = [file.stat().st_mtime for file in self.folder.glob("*.json")]
        return None if began is None or not ends else max(0.0, max(ends) - began)

    @property
    def began(self) -> float | None:
        """When it was first started, in seconds since 1970."""
        try:
            return datetime.datetime.fromisoformat(self.starts[0]["started"]).timestamp()
        except (IndexError, KeyError, TypeError, ValueError):
            return None


def numbers(figures: Any) -> dict[str, float]:
    """The metrics that are finite numbers; nothing of what is no mapping."""
    items = figures.items() if isinstance(figures, dict) else ()
    known = {str(name): float(value) for name, value in items if isinstance(value, int | float)}
    return {name: value for name, value in known.items() if math.isfinite(value)}


def measured_rows(record: dict[str, Any]) -> list[tuple[dict[str, Any], float]]:
    """The rows of a study's or domain's record, each with the record's metric or else its first; those without are left out."""
    rows, found = record.get("rows"), list[tuple[dict[str, Any], float]]()
    for row in rows if isinstance(rows, list) else []:
        figures = numbers(row.get("figures")) if isinstance(row, dict) else {}
        if figures:
            found.append((row, figures.get(str(record.get("figure")), next(iter(figures.values())))))
    return found


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs of some folders; a folder of run folders stands for those. A ConfigError names every folder that holds none."""
    found, problems = list[Path](), list[str]()
    for folder in folders:
        try:
            own = (folder / CONFIG).is_file()
            runs = [folder] if own else sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        except OSError as error:
            problems.append(f"{str(folder)!r} can't be read ({error.strerror}): give the folder of a run.")
            continue
        found += [run for run in runs if run.resolve() not in {other.resolve() for other in found}]
        if not runs:
            problems.append(
                f"{str(folder)!r} holds no run: give a folder that `pretrain`, `finetune` or `study` wrote, with its {CONFIG}."
            )
    if problems:
        raise ConfigError(problems)
    return [_read(path, name) for path, name in zip(found, _names(found), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """Each folder's name, with as many of its parents as tell it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read(folder: Path, name: str) -> RunRecord:
    notes: list[str] = []
    config = _config(folder / CONFIG, notes)
    stage = _stage(config, folder)
    lines = _lines(folder / FILE_NAME, notes, wanted=stage != "study")
    card, results, study = (_object(folder / f"{file}.json", notes) for file in ("card", "results", "study"))
    starts = _object(folder / "run.json", notes).get("starts")
    last = {"pretrain": card, "finetune": results, "study": study}[stage]
    state: State = "finished" if last else "running" if is_held(folder) else "stopped"
    if state == "running":
        notes.append("It is still going: these are its figures so far.")
    elif state == "stopped":
        notes.append("It was stopped before its end: these are the figures that it left.")
    if stage == "study" and not study:
        study = _cells(folder, notes)
    starts = [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []
    domain = _object(folder / "domain.json", notes)
    return RunRecord(folder, name, stage, state, config, starts, lines, card, results, study, domain, tuple(notes))


def _config(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        tree = read_yaml(path)
    except Exception as error:  # no YAML, or no text at all: whatever the parsers raise
        notes.append(f"{path.name} can't be read ({first_line(error)}).")
        return {}
    return {str(key): value for key, value in tree.items()} if isinstance(tree, dict) else {}


def _stage(config: dict[str, Any], folder: Path) -> Stage:
    if "pretext" not in config and "downstream" in config:
        return "finetune"
    is_study = "common" in config or (folder / "study.json").exists()
    return "study" if is_study and "pretext" not in config else "pretrain"


def _cells(folder: Path, notes: list[str]) -> dict[str, Any]:
    """The rows of a study that has not written its table yet: each of its cells is a file.

    Cells of studies across domains do not say what they are of: there it is the file's name, which ends in the seed.
    """
    rows = list[dict[str, Any]]()
    for file in sorted(folder.glob("cells/*.json")):
        if cell := _object(file, notes):
            name, _, seed = file.stem.rpartition("_")
            rows.append(cell if "init" in cell or not seed.isdecimal() else {"init": name, "seed": int(seed), **cell})
    return {"rows": rows} if rows else {}


def _lines(path: Path, notes: list[str], wanted: bool) -> list[dict[str, Any]]:
    try:
        lines = read_metrics(path)
        written = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
    except OSError:
        if wanted:
            notes.append(f"It has no {path.name}: no figure was logged.")
        return []
    if wanted and not lines:
        notes.append(f"{path.name} holds no figure yet.")
    if written > len(lines):
        notes.append(f"{written - len(lines)} broken line(s) of {path.name} are left out.")
    return lines


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON file's object; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} is damaged ({first_line(error)}).")
        return {}
    return found if isinstance(found, dict) else {}
