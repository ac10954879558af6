"""``ssl-pipeline evaluate ENCODER data=… [what=…]``: how good are an encoder's features? One table, one JSON file."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from ssl_pipeline.config.base import ConfigError, FrozenModel, dump
from ssl_pipeline.config.command import check_folder_of, run_command
from ssl_pipeline.data.build import build_views
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.evaluation import protocol
from ssl_pipeline.evaluation.encoder import EncoderConfig, LoadedEncoder, describe_encoder, open_encoder
from ssl_pipeline.evaluation.protocol import Features, Figure
from ssl_pipeline.logging.progress import console, print_table
from ssl_pipeline.logging.redaction import redact
from ssl_pipeline.logging.run import versions, write_json
from ssl_pipeline.metrics.knn import knn_accuracy
from ssl_pipeline.models.artifact import finite
from ssl_pipeline.rng import permutation
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.multi_view import Views

What = Literal["knn", "probe", "few_shot", "spread", "robustness"]
_ALL: tuple[What, ...] = ("knn", "probe", "few_shot", "spread", "robustness")


class KnnConfig(FrozenModel):
    """Neighbors.

    Attributes:
        k: numbers of neighbors; each gives a figure.
        temperature: sharpness of their weights.
    """

    k: tuple[int, ...] = Field((1, 20), min_length=1)
    temperature: float = Field(0.1, gt=0)


class ProbeConfig(FrozenModel):
    """The linear probe.

    Attributes:
        rates: learning rates to choose from.
        layers: what to choose from: ``neck`` and levels (``c2`` … ``c5``); null takes all that the encoder has.
        epochs: passes over the cached features.
        validation: the share of the training labels that the choice looks at.
    """

    rates: tuple[float, ...] = Field((0.003, 0.01, 0.03, 0.1, 0.3), min_length=1)
    layers: tuple[str, ...] | None = None
    epochs: int = Field(50, ge=1)
    validation: float = Field(0.2, gt=0, lt=1)


class FewShotConfig(FrozenModel):
    """Few labels.

    Attributes:
        per_class: labels of each class; each number gives a figure.
        seeds: draws of the labels.
        decay: the probe's weight decay; fixed, since so few labels leave nothing to choose on.
    """

    per_class: tuple[int, ...] = Field((1, 5, 10), min_length=1)
    seeds: int = Field(5, ge=1)
    decay: float = Field(0.1, ge=0)


class EvaluateConfig(EncoderConfig):
    """What is measured, on which images.

    Attributes:
        what: some of ``knn``, ``probe``, ``few_shot``, ``spread``, ``robustness``; null takes all that the data allows.
        split: what the figures are of; everything is learned and chosen on ``train``.
        views: the random views that alignment compares.
        knn: neighbors.
        probe: the linear probe.
        few_shot: few labels.
        images: at most so many images of a split, drawn by name; null for all.
        corrupted: at most so many test images are corrupted, 40 times each.
        output: the JSON file.
    """

    what: tuple[What, ...] | None = None
    split: Literal["test", "dev"] = "test"
    views: ViewsConfig
    knn: KnnConfig = KnnConfig()
    probe: ProbeConfig = ProbeConfig()
    few_shot: FewShotConfig = FewShotConfig()
    images: int | None = Field(None, ge=1)
    corrupted: int = Field(1000, ge=1)
    output: str = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        figures: in the order of the table.
        trials: the probe's validation accuracies, by layer and rate.
        notes: for the log.
    """

    figures: list[Figure]
    trials: dict[str, float]
    notes: list[str]


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measures an encoder's features on a data set."""
    opened_train, opened_test = config.scaled_data.open("train"), config.scaled_data.open(config.split)
    assert opened_train is not None
    what, notes = _settle(config, opened_train, opened_test)
    train, test = _at_most(opened_train, config.images, config.seed), None
    if opened_test is not None:
        test = _at_most(opened_test, config.images, config.seed)
    opened = open_encoder(config, train.channels, train.mean, train.std)
    notes += opened.notes
    layers = _layers(config, opened, "probe" in what)
    figures, trials = list[Figure](), dict[str, float]()
    if "spread" in what:
        figures += protocol.spread_figures(opened, test or train, _views(config, opened, test or train), config.seed)
    if test is None or set(what) == {"spread"}:
        return _finite(figures, trials, notes)

    classes = train.classes
    assert classes is not None
    bank = protocol.read_features(opened, train, layers)
    chosen = None
    if "probe" in what or "robustness" in what:
        probe = config.probe
        chosen = protocol.choose_probe(
            bank, len(classes), probe.rates, probe.epochs, probe.validation, config.seed, opened.share.device
        )
        trials = chosen.trials
    queries = protocol.read_features(opened, test, layers)  # once, and after everything was chosen
    if "knn" in what:
        figures += protocol.knn_figures(bank, queries, len(classes), config.knn.k, config.knn.temperature)
    if chosen is not None:
        figures.append(Figure("probe", chosen.accuracy(queries), chosen.how))
    if "few_shot" in what:
        few = config.few_shot
        found, more = protocol.few_shot_figures(
            bank, queries, classes, few.per_class, few.seeds, few.decay, config.seed
        )
        figures, notes = figures + found, notes + more
    if "robustness" in what:
        assert chosen is not None
        k = min(max(config.knn.k), len(bank.labels))

        def by_neighbors(rows: Features) -> float:
            return knn_accuracy(rows.neck, rows.labels, bank.neck, bank.labels, len(classes), k, config.knn.temperature)

        judges = {"probe": chosen.accuracy, f"knn_{k}": by_neighbors}
        hard = _at_most(test, config.corrupted, config.seed)
        figures += protocol.robustness_figures(opened, hard, judges, chosen.layer, config.seed)
    return _finite(figures, trials, notes)


def _finite(figures: list[Figure], trials: dict[str, float], notes: list[str]) -> Evaluation:
    """What was measured, without what is not a finite number; a note says what is left out."""
    measured = [figure for figure in figures if math.isfinite(figure.value)]
    absent = ", ".join(figure.name for figure in figures if figure not in measured)
    return Evaluation(
        measured, finite(trials), [*notes, f"{absent}: not a finite number, left out"] if absent else notes
    )


def _settle(
    config: EvaluateConfig, train: IndexedDataset, test: IndexedDataset | None
) -> tuple[tuple[What, ...], list[str]]:
    """What can be measured; an error where something was asked for by name that can't."""
    labeled = train.labels is not None and bool((train.labels >= 0).any()) and test is not None
    if labeled and test is not None and test.labels is not None:
        return config.what or _ALL, []
    lack = (
        f"{train.name} has no labels: one folder per class would give them"
        if train.labels is None
        else f"{train.name} has no labeled `{config.split}` split"
    )
    if config.what is None:
        return ("spread",), [f"{lack}; only what needs none is measured"]
    wanted = [name for name in config.what if name != "spread"]
    if wanted:
        raise ConfigError(f"`what` asks for {', '.join(wanted)}, and {lack}. what=[spread] needs none.")
    return config.what, []


def _layers(config: EvaluateConfig, opened: LoadedEncoder, probes: bool) -> list[str]:
    known = protocol.layer_names(opened)
    if config.probe.layers is None or not probes:
        return known if probes else ["neck"]
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
    blueprint, local = opened.blueprint, config.views.local.model_copy(update={"count": 0})
    views = config.views.model_copy(update={"count": 2, "size": blueprint.size, "local": local})
    return build_views(source, views.for_channels(blueprint.channels)[0], blueprint.mean, blueprint.std, config.seed)


def evaluate_and_tell(config: EvaluateConfig) -> None:
    """Measures an encoder's features on a data set."""
    path = Path(config.output).expanduser()
    check_folder_of(path, "`output`")
    found = evaluate(config)
    for note in found.notes:
        console().print(note, markup=False)
    name = config.encoder or f"{config.backbone.name} ({config.backbone.weights or 'random'})"
    print_table(
        f"{name} on {config.data.name}, {config.split}; accuracies in %",
        ["figure", "value", "how"],
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
    run_command("evaluate", EvaluateConfig, evaluate_and_tell, describe_encoder(sys.argv[1:], ["encoder"]))


if __name__ == "__main__":
    main()
