"""Works on the jobs of a study: trains and measures cells, with features that are extracted once for an encoder."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_pipeline.config.files import atomic_write
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.downstream.labels import draw_index
from ssl_pipeline.downstream.plan import Plan
from ssl_pipeline.downstream.pooled_task import Rows, targets_of
from ssl_pipeline.downstream.regime import CachedFeatures
from ssl_pipeline.downstream.selection import selection
from ssl_pipeline.engine.distributed import dist_info, move_to_device, start_accelerator
from ssl_pipeline.evaluation.features import extract_readable
from ssl_pipeline.finetune import model_card
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.logging.run import write_json
from ssl_pipeline.metrics.knn import knn_accuracy
from ssl_pipeline.models.encoder import finite, save
from ssl_pipeline.rng import derive_seed
from ssl_pipeline.study.cells import Cell, Opener
from ssl_pipeline.transforms.preprocessing import Preprocessing


@dataclass(frozen=True)
class FeatureJob:
    """Features of an encoder to be extracted.

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
        features: the file of its encoder's features, if they were extracted.
        record: the cell's file.
        facts: what stands in it beside the metrics.
        model: where its model goes; None keeps none.
    """

    cell: Cell
    features: Path | None
    record: Path
    facts: dict[str, Any]
    model: Path | None


class CellRunner:
    """What works on a study's jobs, one in each process."""

    def __init__(self) -> None:
        self.accelerator, self.opener = start_accelerator(), Opener()
        self.share = dist_info(self.accelerator)

    def run(self, job: FeatureJob | TrainJob) -> str:
        """Does a job; returns what it was, for the log."""
        if isinstance(job, FeatureJob):
            self.read(job)
            return f"features of {next(iter(job.cell.row.values()))}"
        name, value = next(iter(self.train(job).items()))
        return f"{job.cell}: {name} {value:.4f}"

    def read(self, job: FeatureJob) -> None:
        """Extracts features of training images and of those to measure on, and writes them whole or not at all."""
        config = job.cell.config
        (pool, held_out), start = self.opener.sources(config), self.opener.start(config)
        assert held_out is not None
        torch.manual_seed(derive_seed(config.seed, "initialisation"))
        encoder = copy.deepcopy(start.encoder) if start.encoder is not None else start.spec.build()[0]
        encoder, preprocessing = move_to_device(encoder, self.share), Preprocessing.of(start.spec)
        index = torch.arange(len(pool)) if job.knn else job.index
        found = {"index": index}
        for name, source, asked in (("train", pool, index), ("held_out", held_out, None)):
            found[name], found[f"{name}_read"] = extract_readable(encoder, source, preprocessing, self.share, asked)
        if job.knn and pool.labels is not None and held_out.labels is not None:
            bank, wanted = pool.labels[found["train_read"]], held_out.labels[found["held_out_read"]]
            accuracy = knn_accuracy(found["held_out"], wanted, found["train"], bank, len(pool.classes or ()))
            if math.isfinite(accuracy):
                write_json(job.file.with_suffix(".json"), {"knn": accuracy})
        with atomic_write(job.file) as temporary:
            save_file(found, temporary)

    def train(self, job: TrainJob) -> dict[str, float]:
        """Trains and measures a cell as ``finetune`` does, and writes its metrics, the model first."""
        began, cell = time.perf_counter(), job.cell
        config, plan = self.opener.plan(cell.config)
        features = None if job.features is None else cached_features(load_file(job.features), config, plan)
        context = plan.context(cell.seed, self.accelerator, features=features)
        task = plan.train(context)
        metrics = finite(plan.measure(task, context))
        if job.model is not None:
            job.model.mkdir(parents=True, exist_ok=True)
            save(job.model, task, model_card(config, plan, metrics))
        chosen_by = selection(config.labels, config.downstream, config.regime, context.labeled)
        held_out = chosen_by["held_out"]
        record = {
            **cell.row, "label_count": chosen_by["learned_from"] + held_out, "held_out": held_out, "seed": cell.seed,
            "split": config.split, "figures": metrics, "seconds": round(time.perf_counter() - began, 2), **job.facts,
        }  # fmt: skip
        write_json(job.record, record)
        return metrics


def cached_features(found: Mapping[str, Tensor], config: FinetuneConfig, plan: Plan) -> CachedFeatures:
    """A file of features as a plan reads them."""
    index, validation = draw_index(config.labels, config.downstream, plan.pool, config.seed)
    measured = Rows(found["held_out"], targets_of(plan.held_out)[found["held_out_read"]], found["held_out_read"])
    chosen = None if validation is None else rows_of(found, validation, plan.pool)
    return CachedFeatures(rows_of(found, index, plan.pool), chosen, measured)


def rows_of(found: Mapping[str, Tensor], index: Tensor, pool: IndexedDataset) -> Rows:
    """Some training images (sorted int64 indices) as a head reads them, without those that could not be decoded."""
    assert bool(torch.isin(index, found["index"]).all())
    chosen = torch.isin(found["train_read"], index)
    read = found["train_read"][chosen]
    return Rows(found["train"][chosen], targets_of(pool)[read], torch.searchsorted(index, read))
