"""The cells of a study: one training and its measurement each, with all that decides its metrics."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_pipeline.config.base import ConfigError, dump
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.source import at_range_of
from ssl_pipeline.downstream.labels import draw_index
from ssl_pipeline.downstream.plan import Plan, Start
from ssl_pipeline.finetune import open_plan, open_start
from ssl_pipeline.finetune_config import FinetuneConfig

# They decide no metric: the weights have a digest.
_NO_SETTINGS = (
    "output", "encoder", "num_workers", "tracking", "seeds", "resume", "save_every", "save_total_limit",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One training and its measurement; its row and seed tell it from the study's others, and name its file."""

    row: Mapping[str, Any]
    seed: int
    config: FinetuneConfig

    @property
    def name(self) -> str:
        return f"{self.condition}_{self.seed}"

    @property
    def condition(self) -> str:
        return "_".join(slug(str(value).replace("%", "percent")) for value in self.row.values())

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its metrics, beside the bytes of weights and data."""
        return {key: value for key, value in dump(self.config).items() if key not in _NO_SETTINGS}

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.row.values()))}, seed {self.seed}"


class Opener:
    """Opens data and encoders once for the cells that share them."""

    def __init__(self) -> None:
        self._sources: dict[str, tuple[IndexedDataset, IndexedDataset | None]] = {}
        self._starts: dict[str, Start] = {}
        self._digests: dict[str | int, Any] = {}

    def sources(self, config: FinetuneConfig) -> tuple[IndexedDataset, IndexedDataset | None]:
        data = at_range_of(config.data, config.encoder or (config.domain.starts_from if config.domain else None))
        key = f"{data!r} {config.split}"
        if key not in self._sources:
            pool = data.open("train")
            assert pool is not None
            self._sources[key] = pool, data.open(config.split)
        return self._sources[key]

    def start(self, config: FinetuneConfig) -> Start:
        """What a cell on all domains starts from; the last one is kept, as cells come in its order."""
        tree, names = dump(config), ("encoder", "size", "data", "backbone", "neck", "transform")
        key = str([config.starts_fresh, *(tree[name] for name in names)])
        if key not in self._starts:
            self._starts = {key: open_start(config, self.sources(config)[0])}
        return self._starts[key]

    def plan(self, config: FinetuneConfig) -> tuple[FinetuneConfig, Plan]:
        return open_plan(config, self.sources(config), self.start(config) if config.domain is None else None)

    def facts(self, cell: Cell) -> dict[str, Any]:
        """What decides a cell's metrics: its settings, and digests of weights and data."""
        config = cell.config
        sources, place = self.sources(config), str([config.starts_fresh, config.encoder, config.backbone.weights])
        if place not in self._digests:
            self._digests[place] = digest_of_weights(config)
        if id(sources) not in self._digests:
            self._digests[id(sources)] = [source.fingerprint() for source in sources if source is not None]
        return {"settings": cell.settings, "weights": self._digests[place], "data": self._digests[id(sources)]}


def check_cells(cells: Sequence[Cell], opener: Opener, look: Callable[[Plan], None] | None = None) -> None:
    """Checks everything before anything is written: names, configurations, labels, and what cells start from.

    ``look`` is given each plan, and raises a ConfigError if something else is missing.
    """
    check_draws(cells, opener)
    check_starts(cells, opener, look)


def check_draws(cells: Sequence[Cell], opener: Opener) -> None:
    """The part of :func:`check_cells` that needs no encoder."""
    names = dict[str, Cell]()
    for cell in cells:
        other, config = names.setdefault(cell.name, cell), cell.config
        if other is not cell:
            raise ConfigError(
                f"{str(other)!r} and {str(cell)!r} would share the file {cell.name}.json: files are named by small letters and "
                "digits, so name rows that differ in them."
            )
        if config.domain is None:
            pool, held_out = opener.sources(config)
            draw_index(config.labels, config.downstream, pool, cell.seed)
            config.check(pool, held_out)


def check_starts(cells: Sequence[Cell], opener: Opener, look: Callable[[Plan], None] | None = None) -> None:
    """The part of :func:`check_cells` that opens encoders, each once for cells that differ in labels and seed alone."""
    seen = set[tuple[str, ...]]()
    for cell in cells:
        key = (*(str(value) for name, value in cell.row.items() if name != "labels"), str(cell.config.encoder))
        if cell.config.domain is None and key in seen:
            continue
        seen.add(key)
        plan = opener.plan(cell.config)[1]
        if cell.config.domain is not None:
            plan.split(cell.seed)
        if look is not None:
            look(plan)


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two trees of settings, as sentences."""
    sentences = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key, "not there"), now.get(key, "not there")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            sentences += changes(old, new, f"{prefix}{key}.")
        elif old != new:
            sentences.append(f"`{prefix}{key}` was {old!r} and is now {new!r}.")
    return sentences


def digest_of_weights(config: FinetuneConfig) -> str:
    """Changes when the weights that a cell starts from do; names them where they are official, or fresh."""
    if config.starts_fresh:
        return "random"
    place = Path(config.encoder or config.backbone.weights or "").expanduser()
    file = place / "encoder.safetensors" if place.is_dir() else place
    if not file.is_file():
        return str(config.backbone.weights)
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def slug(name: str) -> str:
    """A name as a part of a file's."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "x"
