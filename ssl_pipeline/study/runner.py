"""One cell of a study: trained and measured in whichever process has time, with features that are taken once an encoder."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_pipeline.config.base import dump
from ssl_pipeline.data.loader import Preprocessing
from ssl_pipeline.data.source import IndexedDataset
from ssl_pipeline.downstream.labels import draw_index
from ssl_pipeline.downstream.plan import Start
from ssl_pipeline.downstream.regime import CachedFeatures
from ssl_pipeline.downstream.selection import selection
from ssl_pipeline.downstream.vector import PooledConfig, Rows, targets_of
from ssl_pipeline.engine.distributed import dist_info, move_to_device, start_accelerator
from ssl_pipeline.evaluation.features import extract_readable
from ssl_pipeline.finetune import FinetuneConfig, model_card, open_plan, open_start
from ssl_pipeline.logging.run import write_json
from ssl_pipeline.metrics.knn import knn_accuracy
from ssl_pipeline.models.artifact import save
from ssl_pipeline.rng import derive_seed
from ssl_pipeline.study.grid import Cell


@dataclass(frozen=True)
class FeatureJob:
    """An encoder's features to be taken.

    Attributes:
        cell: one of those that start from it.
        index: the training images, sorted.
        knn: whether all of them are read, and kNN accuracy is measured.
        file: where they go.
    """

    cell: Cell
    index: Tensor
    knn: bool
    file: Path


@dataclass(frozen=True)
class TrainJob:
    """A cell to be trained.

    Attributes:
        cell: which.
        features: where its encoder's are, if they were taken.
        record: the cell's file, with what is to stand in it beside the figures.
        facts: that is.
        model: where its model goes; None keeps none.
    """

    cell: Cell
    features: Path | None
    record: Path
    facts: dict[str, Any]
    model: Path | None


def reads_features(config: FinetuneConfig) -> bool:
    """Whether a cell's probe reads the encoder's features, which may then be taken once for all cells."""
    return isinstance(config.downstream, PooledConfig) and config.regime.probes


class CellRunner:
    """Where one process works: it opens data and encoders once."""

    def __init__(self) -> None:
        self.accelerator = start_accelerator()
        self.share = dist_info(self.accelerator)
        self._sources: dict[str, tuple[IndexedDataset, IndexedDataset]] = {}
        self._starts: dict[str, Start] = {}

    def run(self, task: FeatureJob | TrainJob) -> str:
        """Does a piece of work; returns what it was."""
        cell = task.cell
        if isinstance(task, FeatureJob):
            self.read(task)
            return f"features of {cell.init}"
        name, value = next(iter(self.train(task).items()))
        return f"{cell.init}, {cell.regime}, {cell.labels} labels, seed {cell.seed}: {name} {value:.4f}"

    def sources(self, config: FinetuneConfig) -> tuple[IndexedDataset, IndexedDataset]:
        """Training images and those to measure on."""
        key = f"{dump(config)['data']} {config.split}"
        if key not in self._sources:
            pool, held_out = config.data.open("train"), config.data.open(config.split)
            assert pool is not None
            assert held_out is not None
            self._sources = {key: (pool, held_out)}  # of one study's cells all have the same
        return self._sources[key]

    def start(self, config: FinetuneConfig) -> Start:
        """What a cell starts from."""
        tree = dump(config)
        key = str(
            [config.starts_fresh, *(tree[name] for name in ("encoder", "size", "data", "backbone", "neck", "views"))]
        )
        if key not in self._starts:  # the last one alone: cells come in its order
            self._starts = {key: open_start(config, self.sources(config)[0])}
        return self._starts[key]

    def read(self, task: FeatureJob) -> None:
        """Takes an encoder's features of training images and of those to measure on, and writes them whole or not at all."""
        pool, held_out = self.sources(task.cell.config)
        start = self.start(task.cell.config)
        torch.manual_seed(derive_seed(task.cell.config.seed, "initialisation"))
        encoder = copy.deepcopy(start.encoder) if start.encoder is not None else start.spec.build()[0]
        encoder, preprocessing = move_to_device(encoder, self.share), Preprocessing.of(start.spec)
        index = torch.arange(len(pool)) if task.knn else task.index
        found = {"index": index}
        for name, source, asked in (("train", pool, index), ("held_out", held_out, None)):
            found[name], found[f"{name}_read"] = extract_readable(encoder, source, preprocessing, self.share, asked)
        if task.knn and pool.labels is not None and held_out.labels is not None:
            bank, asked_for = pool.labels[found["train_read"]], held_out.labels[found["held_out_read"]]
            classes = len(pool.classes or ())
            accuracy = knn_accuracy(found["held_out"], asked_for, found["train"], bank, classes)
            if math.isfinite(accuracy):
                write_json(task.file.with_suffix(".json"), {"knn": accuracy})
        partial = task.file.with_suffix(".partial")
        save_file(found, partial)
        partial.replace(task.file)

    def train(self, task: TrainJob) -> dict[str, float]:
        """Trains and measures a cell, and writes its figures, the model first."""
        began, cell, config = time.perf_counter(), task.cell, task.cell.config
        pool, held_out = self.sources(config)
        config, plan = open_plan(config, (pool, held_out), self.start(config))
        features = None
        if task.features is not None:
            rows = load_file(task.features)
            index, validation = draw_index(config.labels, config.downstream, pool, config.seed)
            measured = Rows(rows["held_out"], targets_of(held_out)[rows["held_out_read"]], rows["held_out_read"])
            features = CachedFeatures(
                _of(rows, index, pool), None if validation is None else _of(rows, validation, pool), measured
            )
        context = plan.context(config.seed, self.accelerator, features=features)
        model = plan.train(context)
        figures = plan.measure(model, context)
        if task.model is not None:
            task.model.mkdir(parents=True, exist_ok=True)
            save(task.model, model, model_card(config, plan, figures))
        chosen_by = selection(config.labels, config.downstream, config.regime, context.labeled)
        count = chosen_by["learned_from"] + chosen_by["held_out"]
        row = {
            "init": cell.init, "regime": cell.regime, "labels": cell.labels, "label_count": count, "held_out": chosen_by["held_out"], "seed": cell.seed, "split": config.split,
            "figures": figures, "seconds": round(time.perf_counter() - began, 2),
        }  # fmt: skip
        write_json(task.record, {**row, **task.facts})
        return figures


def _of(rows: dict[str, Tensor], index: Tensor, pool: IndexedDataset) -> Rows:
    """Some training images (sorted int64 indices) as a head reads them, without those that could not be decoded."""
    assert bool(torch.isin(index, rows["index"]).all())
    chosen = torch.isin(rows["train_read"], index)
    read = rows["train_read"][chosen]
    return Rows(rows["train"][chosen], targets_of(pool)[read], torch.searchsorted(index, read))
