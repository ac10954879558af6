"""``ssl-pipeline evaluate ENCODER data=… [metrics=…]``: how good are an encoder's features? One table, one JSON file."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from ssl_pipeline.config.base import ConfigError, dump
from ssl_pipeline.config.command import check_folder_of, run_command
from ssl_pipeline.data.build import build_views
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.evaluation import feature_metrics
from ssl_pipeline.evaluation.feature_metrics import Features, FewShotConfig, KnnConfig, Metric, ProbeConfig
from ssl_pipeline.evaluation.load_encoder import EncoderConfig, LoadedEncoder, describe_encoder, open_encoder
from ssl_pipeline.logging.progress import console, print_table
from ssl_pipeline.logging.redaction import redact
from ssl_pipeline.logging.run import versions, write_json
from ssl_pipeline.metrics.knn import knn_accuracy
from ssl_pipeline.models.encoder import finite
from ssl_pipeline.rng import permutation
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.multi_view import Views

MetricGroup = Literal["knn", "probe", "few_shot", "alignment_uniformity", "robustness"]
_UNLABELED: MetricGroup = "alignment_uniformity"  # the one group that needs no labels


class EvaluateConfig(EncoderConfig):
    """What is measured, on which images.

    Attributes:
        metrics: some of ``knn``, ``probe``, ``few_shot``, ``alignment_uniformity``, ``robustness``; null takes all that the data allows.
        split: what is measured; everything is learned and chosen on ``train``.
        transform: the random views that alignment compares.
        knn: neighbors.
        probe: the linear probe.
        few_shot: few labels.
        images: at most so many images of a split, drawn by name; null for all.
        corrupted: at most so many test images are corrupted, 40 times each.
        output: the JSON file.
    """

    metrics: tuple[MetricGroup, ...] | None = None
    split: Literal["test", "val"] = "test"
    transform: ViewsConfig
    knn: KnnConfig = KnnConfig()
    probe: ProbeConfig = ProbeConfig()
    few_shot: FewShotConfig = FewShotConfig()
    images: int | None = Field(None, ge=1)
    corrupted: int = Field(1000, ge=1)
    output: str = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """The metrics in the order of the table, the probe's validation accuracies by layer and rate, and notes for the log."""

    figures: list[Metric]
    trials: dict[str, float]
    notes: list[str]


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measures an encoder's features on a data set."""
    train, test = config.scaled_data.open("train"), config.scaled_data.open(config.split)
    assert train is not None
    groups, notes = _groups(config, train, test)
    train = _at_most(train, config.images, config.seed)
    test = None if test is None else _at_most(test, config.images, config.seed)
    opened = open_encoder(config, train)
    notes += opened.notes
    layers = _layers(config, opened) if "probe" in groups else ["neck"]
    metrics, trials = list[Metric](), dict[str, float]()
    if _UNLABELED in groups:
        views = _views(config, opened, test or train)
        metrics += feature_metrics.alignment_uniformity_metrics(opened, test or train, views, config.seed)
    if test is not None and set(groups) != {_UNLABELED}:
        found, trials, more = _labeled_metrics(config, opened, groups, layers, train, test)
        metrics, notes = metrics + found, notes + more
    absent = ", ".join(metric.name for metric in metrics if not math.isfinite(metric.value))
    notes += [f"{absent}: not a finite number, left out"] if absent else []
    return Evaluation([metric for metric in metrics if math.isfinite(metric.value)], finite(trials), notes)


def _labeled_metrics(
    config: EvaluateConfig,
    opened: LoadedEncoder,
    groups: tuple[MetricGroup, ...],
    layers: list[str],
    train: IndexedDataset,
    test: IndexedDataset,
) -> tuple[list[Metric], dict[str, float], list[str]]:
    assert train.classes is not None
    classes, metrics, notes, knn = len(train.classes), list[Metric](), list[str](), config.knn
    bank, chosen = feature_metrics.read_features(opened, train, layers), None
    if "probe" in groups or "robustness" in groups:
        chosen = feature_metrics.choose_probe(bank, classes, config.probe, config.seed, opened.share.device)
    queries = feature_metrics.read_features(opened, test, layers)  # once, and after everything was chosen
    if "knn" in groups:
        metrics += feature_metrics.knn_metrics(bank, queries, classes, knn)
    if chosen is not None:
        metrics.append(Metric("probe", chosen.accuracy(queries), chosen.how))
    if "few_shot" in groups:
        found, notes = feature_metrics.few_shot_metrics(bank, queries, train.classes, config.few_shot, config.seed)
        metrics += found
    if "robustness" in groups:
        assert chosen is not None
        k = min(max(knn.k), len(bank.labels))

        def by_neighbors(rows: Features) -> float:
            return knn_accuracy(rows.neck, rows.labels, bank.neck, bank.labels, classes, k, knn.temperature)

        classifiers = {"probe": chosen.accuracy, f"knn_{k}": by_neighbors}
        images = _at_most(test, config.corrupted, config.seed)
        metrics += feature_metrics.robustness_metrics(opened, images, classifiers, chosen.layer, config.seed)
    return metrics, {} if chosen is None else chosen.trials, notes


def _groups(
    config: EvaluateConfig, train: IndexedDataset, test: IndexedDataset | None
) -> tuple[tuple[MetricGroup, ...], list[str]]:
    """The groups of metrics that the data allows; an error where a named one can't be measured."""
    labeled = train.labels is not None and bool((train.labels >= 0).any())
    if labeled and test is not None and test.labels is not None:
        return config.metrics or get_args(MetricGroup), []
    lack = f"{train.name} has no labeled `{config.split}` split"
    if train.labels is None:
        lack = f"{train.name} has no labels: one folder per class would give them"
    if config.metrics is None:
        return (_UNLABELED,), [f"{lack}; only what needs none is measured"]
    wanted = [name for name in config.metrics if name != _UNLABELED]
    if wanted:
        raise ConfigError(f"`metrics` asks for {', '.join(wanted)}, and {lack}. metrics=[{_UNLABELED}] needs none.")
    return config.metrics, []


def _layers(config: EvaluateConfig, opened: LoadedEncoder) -> list[str]:
    levels = list(opened.encoder.widths)  # the neck of a pooled last level is its mean already
    known = ["neck", *(levels[:-1] if opened.blueprint.neck.name == "gap" else levels)]
    if config.probe.layers is None:
        return known
    unknown = [name for name in config.probe.layers if name not in ("neck", *opened.encoder.widths)]
    if unknown:
        raise ConfigError(
            f"`probe.layers`: this encoder has no {', '.join(map(repr, unknown))}. Known: {', '.join(known)}."
        )
    return list(dict.fromkeys(["neck", *config.probe.layers]))


def _at_most(source: IndexedDataset, count: int | None, seed: int) -> IndexedDataset:
    if count is None or len(source) <= count:
        return source
    return source.select(permutation(len(source), seed, "evaluate", "images")[:count].sort().values)


def _views(config: EvaluateConfig, opened: LoadedEncoder, source: IndexedDataset) -> Views:
    blueprint, local = opened.blueprint, config.transform.local_views.model_copy(update={"count": 0})
    views = config.transform.model_copy(update={"num_views": 2, "size": blueprint.size, "local_views": local})
    return build_views(source, views.for_channels(blueprint.channels)[0], blueprint.mean, blueprint.std, config.seed)


def evaluate_and_print(config: EvaluateConfig) -> None:
    """Measures an encoder's features on a data set."""
    path = Path(config.output).expanduser()
    check_folder_of(path, "`output`")
    found = evaluate(config)
    for note in found.notes:
        console().print(note, markup=False)
    name = config.encoder or f"{config.backbone.name} ({config.backbone.weights or 'random'})"
    print_table(
        f"{name} on {config.data.name}, {config.split}; accuracies in %",
        ["metric", "value", "how"],
        [[figure.name, figure.shown(), figure.how] for figure in found.figures],
    )
    record = {
        "encoder": name,
        "figures": {figure.name: figure.value for figure in found.figures},
        "intervals": {figure.name: figure.half for figure in found.figures if figure.half is not None},
        "how": {figure.name: figure.how for figure in found.figures},
        "probe_validation": found.trials,
        "config": redact(dump(config)),
        "versions": versions(),
    }
    write_json(path, record)
    console().print(f"wrote {path}", markup=False)


def main() -> None:
    """The command line."""
    run_command("evaluate", EvaluateConfig, evaluate_and_print, describe_encoder(sys.argv[1:], ["encoder"]))
