"""The images of a run across domains: those it learns from, those it sees without labels, and those it is measured on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.data.splits import draw_labels, stratified_split
from ssl_pipeline.domain.method import MethodConfig
from ssl_pipeline.domain.metrics import open_set_metrics, proxy_a_distance, unlabeled_metrics
from ssl_pipeline.domain.negative_controls import make_control
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.labels import LabeledSplit, LabelsConfig, draw_folds, draw_index
from ssl_pipeline.downstream.pooled_task import Rows
from ssl_pipeline.downstream.task import DownstreamConfig
from ssl_pipeline.evaluation.features import evaluating
from ssl_pipeline.transforms.preprocessing import Preprocessing


@dataclass(frozen=True)
class DomainSplit:
    """The images that a run across domains learns from, sees without labels, and is measured on.

    Attributes:
        method: the method's configuration.
        source: the labeled training images of the source domains; none where a finished model is adapted without them.
        target: those of the target domains, without labels.
        measured: per domain its held-out images of known classes; read by the final evaluation alone.
        targets: which of those domains are targets.
        unknown: the target's held-out images of unknown classes; None without ``known``.
    """

    method: MethodConfig
    source: IndexedDataset
    target: IndexedDataset
    measured: dict[str, IndexedDataset]
    targets: tuple[str, ...]
    unknown: IndexedDataset | None
    _pool: IndexedDataset
    _taught: Tensor
    _hidden: Tensor
    _known: Tensor
    _names: tuple[str, ...]

    def draw(self, labels: LabelsConfig, downstream: DownstreamConfig, seed: int) -> LabeledSplit:
        """What is learned from: labels of the source, and ``target_labels`` of the target.

        Labels that choose, held out or by cross-validation, are the *source's* alone.
        """
        if self.method.starts_from is not None:
            return LabeledSplit(self.source, None)
        train, held_out = draw_index(labels, downstream, self.source, seed)
        folds = draw_folds(labels, downstream, self.source, (train, held_out), seed)
        learned = self.labeled(seed, train)
        if folds is not None:  # the target's images come after the source's
            folds = F.pad(folds, (0, len(learned) - len(train)), value=-1)
        return LabeledSplit(learned, None if held_out is None else self.source.select(held_out), folds)

    def labeled(self, seed: int, taught: Tensor | None = None) -> IndexedDataset:
        """Images of the source (by their numbers in it; None for all), and ``target_labels`` of each class of the target."""
        per_class = self.method.target_labels
        if per_class == 0:
            return self.source if taught is None else self.source.select(taught)
        hidden = self._pool.select(self._hidden)
        try:
            drawn = draw_labels(_labels(hidden), per_class, None, seed, hidden.classes)
        except ConfigError as error:
            raise ConfigError(str(error).replace("labels.per_class", "domain.target_labels")) from None
        of_source = self._taught if taught is None else self._taught[taught]
        both = self._pool.select(torch.cat([of_source, self._hidden[drawn]]))
        return _renumbered(both, self._known, self._names)

    @torch.no_grad()
    def evaluate(
        self, classifier: Classification, learned: LabeledSplit, preprocessing: Preprocessing, share: DistInfo
    ) -> dict[str, float]:
        """Accuracy on the targets together, per domain, and per class of the targets; the worst target where there are several.

        Beside it the metrics of ``domain.metrics``: those that need no label of the target, the distance of source and target
        where both have held-out images, and with ``known`` how well unknown classes are found.
        """

        def read(images: IndexedDataset) -> Rows:
            return classifier.read(images, preprocessing, share)

        rows = {name: read(images) for name, images in self.measured.items()}
        labels = {name: found.targets for name, found in rows.items()}
        logits = {n: classifier.of_features(r.features.to(share.device)).float().cpu() for n, r in rows.items()}
        predictions, truth = (torch.cat([side[name] for name in self.targets]) for side in (logits, labels))
        found = classifier.score(predictions, truth)
        accuracies = {name: classifier.score(logits[name], labels[name])["accuracy"] for name in rows}
        if len(self.targets) > 1:
            found["worst_domain_accuracy"] = min(accuracies[name] for name in self.targets)
        found |= {f"accuracy/{name}": value for name, value in accuracies.items()}
        right = (predictions.argmax(1) == truth).float()
        classes = self.source.classes or ()
        found |= {f"class_accuracy/{classes[c]}": float(right[truth == c].mean()) for c in truth.unique().tolist()}
        found |= unlabeled_metrics(classifier, self.target, learned.validation, preprocessing, share)
        sides = [
            [r.features for n, r in rows.items() if (n in self.targets) == is_target] for is_target in (False, True)
        ]
        if all(sum(map(len, side)) > 1 for side in sides):
            found["label_free/proxy_a_distance"] = proxy_a_distance(*map(torch.cat, sides))
        if self.unknown is not None:
            held_out = None if learned.validation is None else read(learned.validation)
            unknown, taught = read(self.unknown), read(learned.train)
            with evaluating(classifier):
                found |= open_set_metrics(classifier, taught, held_out, rows, self.targets, unknown, share.device)
        return found


def split_domains(
    config: MethodConfig, pool: IndexedDataset, held_out: IndexedDataset | None, classes: tuple[str, ...] | None = None
) -> DomainSplit:
    """Splits images of several domains by what a method names.

    Args:
        config: names the domains.
        pool: training images.
        held_out: images to measure on.
        classes: those of the finished model that the run starts from, in its order; None where a source teaches them.

    Raises:
        ConfigError: naming a domain that is absent, a source without labels, or a target that there is nothing to measure on.
    """
    if pool.domains is None or pool.domain_names is None:
        raise ConfigError(
            f"`domain` needs images whose domains are known, and {pool.name} has none: take data=domain_folder, data=table with a "
            "column `domain`, or data=fashion_domains to try it."
        )
    targets, sources = _chosen(config, pool, has_source=classes is None)
    if pool.labels is None or pool.classes is None:
        raise ConfigError(
            f"`domain.source`: {pool.name} has no labels to learn from: put images into domain/class/image."
        )
    known, names = _known(config, pool, classes)
    of_source, of_target = _in(pool, sources), _in(pool, targets)
    unlabeled = [n for n in sources if not bool((pool.labels[_in(pool, [n])] >= 0).any())]
    if unlabeled:
        raise ConfigError(f"`domain.source`: no image of {', '.join(unlabeled)} has a label to learn from.")
    if config.negative_control == "no_shift":
        labels = pool.labels[of_source]
        rest, held = stratified_split(labels, int((labels >= 0).sum()) // 2, "control", "no shift")
        of_source, of_target, targets = of_source[rest], of_source[held], sources
    taught = of_source[torch.isin(pool.labels[of_source], known)]
    source = _renumbered(pool.select(taught), known, names)
    target = pool.select(of_target)
    target.labels = target.classes = None
    if config.negative_control in ("noise", "shuffled"):
        target = make_control(config.negative_control, target)
    hidden = of_target[torch.isin(pool.labels[of_target], known)]
    learned = _labels(source) if classes is None else torch.arange(len(classes))
    measured, unknown = _measured(
        config, held_out, list(dict.fromkeys([*targets, *sources])), targets, known, names, learned
    )
    if classes is not None and unknown is not None:
        raise ConfigError(
            f"`domain.target`: {pool.name} has classes that the model in {config.starts_from!r} does not know. It knows "
            f"{', '.join(classes)}: leave the others out."
        )
    return DomainSplit(config, source, target, measured, tuple(targets), unknown, pool, taught, hidden, known, names)


def _chosen(config: MethodConfig, pool: IndexedDataset, has_source: bool) -> tuple[list[str], list[str]]:
    """The names of targets and sources."""
    assert pool.domains is not None
    assert pool.domain_names is not None
    present = [name for number, name in enumerate(pool.domain_names) if bool((pool.domains == number).any())]
    problems = []
    for key, names in (("target", config.target), ("source", config.source or ())):
        absent = [name for name in names if name not in present]
        if absent:
            problems.append(
                f"`domain.{key}`: {pool.name} has no training image of {', '.join(map(repr, absent))}. Its domains: {', '.join(present)}."
            )
    if not config.target and config.negative_control != "no_shift":
        problems.append(f"`domain.target` is required: one or more of {', '.join(present)}.")
    sources = list(config.source) if config.source is not None else [n for n in present if n not in config.target]
    sources = sources if has_source else []
    both = [name for name in sources if name in config.target]
    if both:
        problems.append(f"`domain.source` and `domain.target` both name {', '.join(both)}: name a domain in one place.")
    if has_source and not sources:
        problems.append(
            f"no domain is left to learn from: {pool.name} has {', '.join(present)}, and all of them are targets."
        )
    if problems:
        raise ConfigError(problems)
    return list(config.target), sources


def _known(
    config: MethodConfig, pool: IndexedDataset, classes: tuple[str, ...] | None
) -> tuple[Tensor, tuple[str, ...]]:
    """The numbers of the classes to learn, in the pool's numbering, and their names.

    A finished model's are in its own order; one that the pool lacks has a number that no image has.
    """
    assert pool.classes is not None
    if classes is not None:
        numbers = [pool.classes.index(name) if name in pool.classes else -1 for name in classes]
        if max(numbers) < 0:
            raise ConfigError(
                f"`domain.model`: the model in {config.starts_from!r} knows {', '.join(classes)}, and {pool.name} has "
                f"{', '.join(pool.classes)}: they share no class."
            )
        absent_from = len(pool.classes)
        return torch.tensor([absent_from + i if n < 0 else n for i, n in enumerate(numbers)]), classes
    if config.known is None:
        return torch.arange(len(pool.classes)), pool.classes
    absent = [name for name in config.known if name not in pool.classes]
    if absent or len(set(config.known)) < 2:
        raise ConfigError(
            f"`domain.known`: {', '.join(map(repr, absent)) or 'fewer than two'}: name two or more of {', '.join(pool.classes)}."
        )
    known = sorted(pool.classes.index(name) for name in set(config.known))
    return torch.tensor(known), tuple(pool.classes[c] for c in known)


def _measured(
    config: MethodConfig,
    held_out: IndexedDataset | None,
    domains: list[str],
    targets: list[str],
    known: Tensor,
    names: tuple[str, ...],
    taught: Tensor,
) -> tuple[dict[str, IndexedDataset], IndexedDataset | None]:
    """Per domain the images to measure on, and the target's of unknown classes."""
    if held_out is None or held_out.labels is None or held_out.domains is None or held_out.domain_names is None:
        raise ConfigError("there are no labeled images of known domains to measure on: see the keys in `configs/data`.")
    measured = {}
    for name in domains:
        index = _in(held_out, [name]) if name in held_out.domain_names else torch.arange(0)
        images = held_out.select(index[torch.isin(held_out.labels[index], known)])
        if len(images):
            measured[name] = _renumbered(images, known, names)
    missing = [name for name in targets if name not in measured]
    if missing:
        raise ConfigError(
            f"`domain.target`: {held_out.name} has no labeled image of {', '.join(missing)} to measure on"
            + (" of the known classes." if config.known else ".")
        )
    for name in targets:
        strange = set(_labels(measured[name]).tolist()) - set(taught.tolist())
        classes = measured[name].classes or ()
        named = ", ".join(classes[c] for c in sorted(strange))
        if strange == set(_labels(measured[name]).tolist()):
            raise ConfigError(
                f"`domain.target`: {name} shares no class with the source: it has {named}, and nothing could learn them."
            )
        if strange:
            raise ConfigError(
                f"`domain.target`: {name} has classes that no source image has: {named}. Leave them out, or name the classes to learn by "
                "`domain.known`: the others are then measured as unknown."
            )
    index = _in(held_out, targets)
    unknown = held_out.select(index[~torch.isin(held_out.labels[index], known) & (held_out.labels[index] >= 0)])
    return measured, unknown if len(unknown) else None


def _in(images: IndexedDataset, names: list[str]) -> Tensor:
    """The images of some domains, a sorted int64 index."""
    assert images.domains is not None
    assert images.domain_names is not None
    numbers = [images.domain_names.index(name) for name in names]
    return torch.isin(images.domains, torch.tensor(numbers, dtype=torch.int64)).nonzero()[:, 0]


def _renumbered(images: IndexedDataset, known: Tensor, names: tuple[str, ...]) -> IndexedDataset:
    """The same images, their classes numbered from 0 in the order of the known ones; in place."""
    place = torch.empty(int(known.max()) + 1, dtype=torch.int64)
    place[known] = torch.arange(len(known))
    images.labels, images.classes = place[_labels(images)], names
    return images


def _labels(images: IndexedDataset) -> Tensor:
    assert images.labels is not None
    return images.labels
