"""What is measured of an encoder, and how it is kept honest: choices look at held-out training labels, the test is read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.splits import draw_labels, stratified_split
from ssl_pipeline.evaluation.corruptions import CORRUPTIONS, STRENGTHS, Corrupted
from ssl_pipeline.evaluation.encoder import LoadedEncoder
from ssl_pipeline.evaluation.features import extract, extract_readable, two_views
from ssl_pipeline.metrics import collapse
from ssl_pipeline.metrics.interval import interval
from ssl_pipeline.metrics.knn import knn_accuracy
from ssl_pipeline.metrics.linear_probe import fit_linear
from ssl_pipeline.metrics.sgd_probe import choose, sweep
from ssl_pipeline.rng import permutation
from ssl_pipeline.transforms.multi_view import Views

_PAIRS = 2048  # rows for figures that look at pairs


@dataclass(frozen=True)
class Figure:
    """One measured value.

    Attributes:
        name: the key it has in the file.
        value: the figure.
        how: by which settings, for the table.
        share: whether it is a share, shown in percent.
        half: half the 95 % interval; None where there is none.
    """

    name: str
    value: float
    how: str
    share: bool = True
    half: float | None = None

    def shown(self) -> str:
        """For people: percent for shares."""
        if not self.share:
            return f"{self.value:.3f}"
        return f"{100 * self.value:.1f}" + (f" ± {100 * self.half:.1f}" if self.half is not None else "")


@dataclass(frozen=True)
class Features:
    """The features of a labeled source, by layer.

    Attributes:
        layers: ``neck`` and the pooled levels, float32 of shape (N, width) each.
        labels: int64 of shape (N,).
    """

    layers: dict[str, Tensor]
    labels: Tensor

    @property
    def neck(self) -> Tensor:
        """What the encoder gives."""
        return self.layers["neck"]

    def select(self, index: Tensor) -> Features:
        """The chosen rows."""
        return Features({name: rows[index] for name, rows in self.layers.items()}, self.labels[index])


def layer_names(opened: LoadedEncoder) -> list[str]:
    """The encoder's layers, ``neck`` first; a last level whose mean the neck is already is left out."""
    same = opened.blueprint.neck.name == "gap"
    levels = list(opened.encoder.widths)
    return ["neck", *(levels[:-1] if same else levels)]


def read_features(opened: LoadedEncoder, source: IndexedDataset, layers: Sequence[str]) -> Features:
    """All layers of a source's labeled images in one pass."""
    assert source.labels is not None
    encoder = opened.encoder

    def forward(images: Tensor) -> Tensor:
        levels = [name for name in layers if name != "neck"]
        if not levels:
            return encoder.features(images)
        maps = encoder.feature_maps(images)
        return torch.cat([encoder.features(images), *(maps[name].mean((2, 3)) for name in levels)], 1)

    labeled = (source.labels >= 0).nonzero()[:, 0]
    rows, read = extract_readable(encoder, source, opened.preprocessing, opened.share, labeled, forward)
    widths = {"neck": encoder.width, **encoder.widths}
    parts = rows.split([widths[name] for name in layers], 1)
    return Features(dict(zip(layers, parts, strict=True)), source.labels[read])


def knn_figures(train: Features, test: Features, classes: int, ks: Sequence[int], temperature: float) -> list[Figure]:
    """The accuracy by each of some numbers of neighbors; all are reported, none is chosen.

    Raises:
        ConfigError: more neighbors than there are rows.
    """
    if max(ks) > len(train.labels):
        raise ConfigError(
            f"`knn.k` is {max(ks)}, and the bank has only {len(train.labels)} labeled training images: ask for at most that many."
        )
    how = f"τ = {temperature:g}, {len(train.labels)} in the bank, exact"
    return [
        Figure(f"knn_{k}", knn_accuracy(test.neck, test.labels, train.neck, train.labels, classes, k, temperature),
               f"k = {k}, {how}")
        for k in ks
    ]  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """The probe that did best on validation labels.

    Attributes:
        layer: what it reads.
        weight: shape (classes, D).
        bias: shape (classes,).
        trials: validation accuracy by layer and rate.
        how: for the table.
    """

    layer: str
    weight: Tensor
    bias: Tensor
    trials: dict[str, float]
    how: str

    def accuracy(self, features: Features) -> float:
        """The share it gets right."""
        logits = features.layers[self.layer] @ self.weight.T + self.bias
        return float((logits.argmax(1) == features.labels).float().mean())


def choose_probe(
    train: Features, classes: int, rates: Sequence[float], epochs: int, validation: float, seed: int, device: torch.device
) -> Chosen:  # fmt: skip
    """Trains a probe for every layer and rate on a part of the training labels, and chooses on the rest of them."""
    rest, held_out = stratified_split(
        train.labels, max(1, round(validation * len(train.labels))), seed, "probe validation"
    )
    if not len(rest) or not len(held_out):
        raise ConfigError(f"`probe.validation`: {len(train.labels)} labels are too few to hold some out: add images.")
    learn, check, trials = train.select(rest), train.select(held_out), dict[str, float]()
    best: tuple[float, Chosen] | None = None
    for layer, rows in learn.layers.items():
        probes = sweep(rows.to(device), learn.labels.to(device), classes, rates, epochs, seed=seed)
        which, found = choose(probes, check.layers[layer].to(device), check.labels.to(device))
        trials |= {f"{layer} {rate:g}": accuracy for rate, accuracy in zip(rates, found, strict=True)}
        if best is None or found[which] > best[0]:
            how = f"{layer}, rate {rates[which]:g}: best of {len(learn.layers)} × {len(rates)} on {len(held_out)} training labels"
            best = found[which], Chosen(layer, probes.weight[which].cpu(), probes.bias[which].cpu(), trials, how)
    assert best is not None
    return best[1]


def few_shot_figures(
    train: Features, test: Features, classes: Sequence[str], counts: Sequence[int], seeds: int, decay: float, seed: int
) -> tuple[list[Figure], list[str]]:
    """A solved probe on few labels a class, by several draws of them. Its weight decay is fixed: there is nothing to choose on.

    Returns:
        The figures, and notes on the numbers that a class has too few labels for.
    """
    least = int(train.labels.bincount(minlength=len(classes))[train.labels.unique()].min())
    notes = [
        f"few_shot of {count}: left out, as a class has only {least} labels"
        for count in counts
        if count > least
    ]  # fmt: skip
    figures = []
    for count in (count for count in counts if count <= least):
        right = []
        for draw in range(seed, seed + seeds):
            few = train.select(draw_labels(train.labels, count, None, draw, classes))
            weight, bias = fit_linear(few.neck, few.labels, len(classes), decay)
            right.append(float(((test.neck @ weight.T + bias).argmax(1) == test.labels).float().mean()))
        found = interval(right)
        how = f"{count} a class, {seeds} draws, decay {decay:g} (fixed)"
        figures.append(Figure(f"few_shot_{count}", found.mean, how, half=found.half if seeds > 1 else None))
    return figures, notes


def spread_figures(opened: LoadedEncoder, source: IndexedDataset, views: Views, seed: int) -> list[Figure]:
    """How the features lie, without any label: effective rank, standard deviation, uniformity, alignment."""
    index = permutation(len(source), seed, "spread")[:_PAIRS].sort().values
    rows = extract(opened.encoder, source, opened.preprocessing, opened.share, index)
    first, second = two_views(opened.encoder, source, views, opened.share.device, index[:256])
    if not bool(torch.isfinite(rows).all()):
        raise ConfigError("the encoder gives features that are no numbers (NaN or infinite): its weights are damaged.")
    how = f"{len(index)} images"
    return [
        Figure("effective_rank", collapse.effective_rank(rows), f"of {opened.encoder.width}, {how}", share=False),
        Figure("feature_std", collapse.feature_std(rows), f"1 is spread evenly, 0 is collapse, {how}", share=False),
        Figure("uniformity", collapse.uniformity(rows), f"lower is more even, {how}", share=False),
        Figure("alignment", collapse.alignment(first, second), f"0 is perfect, two views of {len(first)}", share=False),
    ]


def robustness_figures(
    opened: LoadedEncoder, source: IndexedDataset, judges: dict[str, Callable[[Features], float]], layer: str, seed: int
) -> list[Figure]:
    """Accuracy on corrupted images, per corruption the mean over five strengths, by classifiers that never saw any.

    Args:
        opened: the encoder.
        source: the clean test images.
        judges: by name, features to accuracy.
        layer: the layer that they read beside the neck.
        seed: of the noise.
    """
    if source.channels not in (1, 3):
        raise ConfigError(
            f"`robustness` corrupts grayscale and RGB images, and {source.name} has {source.channels} channels."
        )
    seen, layers = opened.preprocessing, list(dict.fromkeys(["neck", layer]))
    # What is corrupted is what the encoder sees: already resized and cut.
    as_seen = replace(opened, blueprint=opened.blueprint.model_copy(update={"resize": None}))
    found: dict[str, list[float]] = {}
    for name in CORRUPTIONS:
        for strength in STRENGTHS:
            corrupted = Corrupted(source, seen.size, name, strength, seed, seen.resize, seen.mean)
            features = read_features(as_seen, corrupted, layers)
            for judge, accuracy in judges.items():
                value = accuracy(features)
                found.setdefault(f"{judge}_{name}", []).append(value)
                found.setdefault(f"{judge}_corrupted", []).append(value)
    how = f"mean of strengths 1 to 5, {len(source)} images"
    figures = [
        Figure(name, sum(values) / len(values), f"{how}: {', '.join(f'{100 * v:.0f}' for v in values)}")
        for name, values in found.items()
        if not name.endswith("_corrupted")
    ]
    return [
        *figures,
        *(
            Figure(f"{judge}_corrupted", sum(values) / len(values), f"mean of all {len(CORRUPTIONS)} corruptions")
            for judge in judges
            if (values := found[f"{judge}_corrupted"])
        ),
    ]
