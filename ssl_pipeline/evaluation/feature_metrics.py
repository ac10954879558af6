"""The metrics of ``ssl-pipeline evaluate``: choices are made on held-out training labels, and the test is read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, FrozenModel
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.splits import draw_labels, stratified_split
from ssl_pipeline.evaluation.corruptions import CORRUPTIONS, STRENGTHS, Corrupted
from ssl_pipeline.evaluation.features import extract, extract_readable, two_views
from ssl_pipeline.evaluation.load_encoder import LoadedEncoder
from ssl_pipeline.metrics import collapse
from ssl_pipeline.metrics.interval import interval
from ssl_pipeline.metrics.knn import knn_accuracy
from ssl_pipeline.metrics.linear_probe import fit_linear, sgd_probes
from ssl_pipeline.rng import permutation
from ssl_pipeline.transforms.multi_view import Views

_PAIRS = 2048  # rows for metrics of pairs


class KnnConfig(FrozenModel):
    """Neighbors.

    Attributes:
        k: numbers of neighbors; each gives a metric.
        temperature: sharpness of their weights.
    """

    k: tuple[int, ...] = Field((1, 20), min_length=1)
    temperature: float = Field(0.1, gt=0)


class ProbeConfig(FrozenModel):
    """The linear probe.

    Attributes:
        lrs: learning rates to choose from.
        layers: what to choose from: ``neck`` and levels (``c2`` … ``c5``); null takes all that the encoder has.
        epochs: passes over the cached features.
        validation: the share of the training labels that the choice is made on.
    """

    lrs: tuple[float, ...] = Field((0.003, 0.01, 0.03, 0.1, 0.3), min_length=1)
    layers: tuple[str, ...] | None = None
    epochs: int = Field(50, ge=1)
    validation: float = Field(0.2, gt=0, lt=1)


class FewShotConfig(FrozenModel):
    """Few labels.

    Attributes:
        per_class: labels of each class; each number gives a figure.
        seeds: draws of the labels.
        weight_decay: the probe's weight decay; fixed, since so few labels leave nothing to choose on.
    """

    per_class: tuple[int, ...] = Field((1, 5, 10), min_length=1)
    seeds: int = Field(5, ge=1)
    weight_decay: float = Field(0.1, ge=0)


@dataclass(frozen=True)
class Metric:
    """One measured value, by which settings (``how``), whether it is a share shown in percent, and half its 95 % interval."""

    name: str
    value: float
    how: str
    share: bool = True
    half: float | None = None

    def shown(self) -> str:
        if not self.share:
            return f"{self.value:.3f}"
        return f"{100 * self.value:.1f}" + (f" ± {100 * self.half:.1f}" if self.half is not None else "")


@dataclass(frozen=True)
class Features:
    """The features of a labeled source: per layer (``neck`` and the pooled levels) float32 (N, width), and labels, int64 (N,)."""

    layers: dict[str, Tensor]
    labels: Tensor

    @property
    def neck(self) -> Tensor:
        return self.layers["neck"]

    def select(self, index: Tensor) -> Features:
        return Features({name: rows[index] for name, rows in self.layers.items()}, self.labels[index])


def read_features(opened: LoadedEncoder, source: IndexedDataset, layers: Sequence[str]) -> Features:
    """Some layers, ``neck`` first, of a source's labeled images in one pass."""
    assert source.labels is not None
    encoder, levels = opened.encoder, layers[1:]

    def forward(images: Tensor) -> Tensor:
        if not levels:
            return encoder.features(images)
        maps = encoder.feature_maps(images)
        return torch.cat([encoder.features(images), *(maps[name].mean((2, 3)) for name in levels)], 1)

    labeled = (source.labels >= 0).nonzero()[:, 0]
    rows, read = extract_readable(encoder, source, opened.preprocessing, opened.share, labeled, forward)
    parts = rows.split([encoder.width, *(encoder.widths[name] for name in levels)], 1)
    return Features(dict(zip(layers, parts, strict=True)), source.labels[read])


def knn_metrics(train: Features, test: Features, classes: int, config: KnnConfig) -> list[Metric]:
    """The accuracy by each of some numbers of neighbors; all are reported, none is chosen.

    Raises:
        ConfigError: more neighbors than there are rows.
    """
    temperature, bank = config.temperature, (train.neck, train.labels)
    if max(config.k) > len(train.labels):
        raise ConfigError(
            f"`knn.k` is {max(config.k)}, and the bank has only {len(train.labels)} labeled training images: ask for at most that many."
        )
    how = f"τ = {temperature:g}, {len(train.labels)} in the bank, exact"
    found = {k: knn_accuracy(test.neck, test.labels, *bank, classes, k, temperature) for k in config.k}
    return [Metric(f"knn_{k}", value, f"k = {k}, {how}") for k, value in found.items()]


@dataclass(frozen=True)
class ChosenProbe:
    """The probe that did best on validation labels: weight (classes, D) and bias (classes,) for one layer.

    ``trials`` are the validation accuracies by layer and rate.
    """

    layer: str
    weight: Tensor
    bias: Tensor
    trials: dict[str, float]
    how: str

    def accuracy(self, features: Features) -> float:
        return _accuracy(features.layers[self.layer], features.labels, self.weight, self.bias)


def _accuracy(rows: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> float:
    return float(((rows @ weight.T + bias).argmax(1) == labels).float().mean())


def choose_probe(train: Features, classes: int, config: ProbeConfig, seed: int, device: torch.device) -> ChosenProbe:
    """Trains a probe for every layer and rate on a part of the training labels, and chooses on the rest of them."""
    rates, count = config.lrs, max(1, round(config.validation * len(train.labels)))
    rest, held_out = stratified_split(train.labels, count, seed, "probe validation")
    if not len(rest) or not len(held_out):
        raise ConfigError(f"`probe.validation`: {len(train.labels)} labels are too few to hold some out: add images.")
    learn, check, trials = train.select(rest), train.select(held_out), dict[str, float]()
    best, chosen = -1.0, None
    for layer, rows in learn.layers.items():
        probes = sgd_probes(rows.to(device), learn.labels.to(device), classes, rates, config.epochs, seed=seed)
        which, found = probes.choose(check.layers[layer].to(device), check.labels.to(device))
        trials |= {f"{layer} {rate:g}": accuracy for rate, accuracy in zip(rates, found, strict=True)}
        if found[which] > best:
            how = f"{layer}, rate {rates[which]:g}: best of {len(learn.layers)} × {len(rates)} on {len(held_out)} training labels"
            best = found[which]
            chosen = ChosenProbe(layer, probes.weight[which].cpu(), probes.bias[which].cpu(), trials, how)
    assert chosen is not None
    return chosen


def few_shot_metrics(
    train: Features, test: Features, classes: Sequence[str], config: FewShotConfig, seed: int
) -> tuple[list[Metric], list[str]]:
    """A solved probe on few labels a class, by several draws of them. Its weight decay is fixed: there is nothing to choose on.

    Returns:
        The metrics, and notes on the numbers that a class has too few labels for.
    """
    least = int(train.labels.bincount(minlength=len(classes))[train.labels.unique()].min())
    metrics, notes, decay = [], [], config.weight_decay
    for count in config.per_class:
        if count > least:
            notes.append(f"few_shot of {count}: left out, as a class has only {least} labels")
            continue
        right = []
        for draw in range(seed, seed + config.seeds):
            few = train.select(draw_labels(train.labels, count, None, draw, classes))
            right.append(_accuracy(test.neck, test.labels, *fit_linear(few.neck, few.labels, len(classes), decay)))
        found = interval(right)
        how = f"{count} a class, {config.seeds} draws, decay {decay:g} (fixed)"
        metrics.append(Metric(f"few_shot_{count}", found.mean, how, half=found.half if config.seeds > 1 else None))
    return metrics, notes


def alignment_uniformity_metrics(
    opened: LoadedEncoder, source: IndexedDataset, views: Views, seed: int
) -> list[Metric]:
    """The distribution of the features, without any label: effective rank, standard deviation, uniformity, alignment."""
    index = permutation(len(source), seed, "spread")[:_PAIRS].sort().values
    rows = extract(opened.encoder, source, opened.preprocessing, opened.share, index)
    first, second = two_views(opened.encoder, source, views, opened.share.device, index[:256])
    if not bool(torch.isfinite(rows).all()):
        raise ConfigError("the encoder gives features that are no numbers (NaN or infinite): its weights are damaged.")
    how = f"{len(index)} images"
    return [
        Metric("effective_rank", collapse.effective_rank(rows), f"of {opened.encoder.width}, {how}", share=False),
        Metric("feature_std", collapse.feature_std(rows), f"1 is spread evenly, 0 is collapse, {how}", share=False),
        Metric("uniformity", collapse.uniformity(rows), f"lower is more even, {how}", share=False),
        Metric("alignment", collapse.alignment(first, second), f"0 is perfect, two views of {len(first)}", share=False),
    ]


def robustness_metrics(
    opened: LoadedEncoder,
    source: IndexedDataset,
    classifiers: dict[str, Callable[[Features], float]],
    layer: str,
    seed: int,
) -> list[Metric]:
    """Accuracy on corrupted test images, per corruption the mean over five strengths, of classifiers that never saw any.

    The classifiers (features to accuracy) read the neck and another layer.
    """
    if source.channels not in (1, 3):
        raise ConfigError(
            f"`robustness` corrupts grayscale and RGB images, and {source.name} has {source.channels} channels."
        )
    seen, layers = opened.preprocessing, list(dict.fromkeys(["neck", layer]))
    # What is corrupted is what the encoder sees: already resized and cut.
    as_seen = replace(opened, blueprint=opened.blueprint.model_copy(update={"resize": None}))
    found: dict[str, dict[str, list[float]]] = {}
    for name in CORRUPTIONS:
        for strength in STRENGTHS:
            corrupted = Corrupted(source, seen.size, name, strength, seed, seen.resize, seen.mean)
            features = read_features(as_seen, corrupted, layers)
            for classifier, accuracy in classifiers.items():
                found.setdefault(name, {}).setdefault(classifier, []).append(accuracy(features))
    how = f"mean of strengths 1 to 5, {len(source)} images"
    metrics = [
        Metric(f"{classifier}_{name}", _mean(values), f"{how}: {', '.join(f'{100 * v:.0f}' for v in values)}")
        for name, by_classifier in found.items()
        for classifier, values in by_classifier.items()
    ]
    overall = {name: _mean([v for values in found.values() for v in values[name]]) for name in classifiers}
    how = f"mean of all {len(CORRUPTIONS)} corruptions"
    return [*metrics, *(Metric(f"{name}_corrupted", value, how) for name, value in overall.items())]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
