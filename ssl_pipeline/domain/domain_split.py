"""The images of a run across domains: those it learns from, those it sees without labels, and those it is measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.dataset import ArrayDataset, IndexedDataset
from ssl_pipeline.data.decode import as_8_bit
from ssl_pipeline.data.splits import draw_labels, stratified_split
from ssl_pipeline.domain.method import Control, MethodConfig
from ssl_pipeline.downstream.labels import LabeledSplit, LabelsConfig, draw_folds, draw_index
from ssl_pipeline.downstream.task import DownstreamConfig
from ssl_pipeline.rng import derive_seed


@dataclass(frozen=True)
class KnownClasses:
    """The classes to learn: their numbers in the pool's numbering, and their names, both in the order of the new numbers."""

    numbers: Tensor
    names: tuple[str, ...]

    def among(self, images: IndexedDataset, index: Tensor) -> Tensor:
        """The samples of an index that are of these classes."""
        return index[torch.isin(_labels(images)[index], self.numbers)]

    def renumber(self, images: IndexedDataset) -> IndexedDataset:
        """The same images, which are all of these classes, numbered from 0; in place."""
        place = torch.empty(int(self.numbers.max()) + 1, dtype=torch.int64)
        place[self.numbers] = torch.arange(len(self.numbers))
        images.labels, images.classes = place[_labels(images)], self.names
        return images


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
    _known: KnownClasses

    def draw(self, labels: LabelsConfig, downstream: DownstreamConfig, seed: int) -> LabeledSplit:
        """What is learned from: labels of the source, and ``target_labels`` of the target.

        Labels that choose, held out or by cross-validation, are the *source's* alone.
        """
        if self.method.starts_from is not None:
            return LabeledSplit(self.source, None)
        train, held_out = drawn = draw_index(labels, downstream, self.source, seed)
        folds = draw_folds(labels, downstream, self.source, drawn, seed)
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
        return self._known.renumber(self._pool.select(torch.cat([of_source, self._hidden[drawn]])))


def split_domains(
    config: MethodConfig, pool: IndexedDataset, held_out: IndexedDataset | None, classes: tuple[str, ...] | None = None
) -> DomainSplit:
    """Splits training images and those to measure on by the domains that a method names.

    ``classes`` are those of the finished model that the run starts from, in its order; None where a source teaches them.
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
    known = _known(config, pool, classes)
    of_source, of_target = _in(pool, sources), _in(pool, targets)
    unlabeled = [n for n in sources if not bool((pool.labels[_in(pool, [n])] >= 0).any())]
    if unlabeled:
        raise ConfigError(f"`domain.source`: no image of {', '.join(unlabeled)} has a label to learn from.")
    if config.negative_control == "no_shift":
        labels = pool.labels[of_source]
        rest, held = stratified_split(labels, int((labels >= 0).sum()) // 2, "control", "no shift")
        of_source, of_target, targets = of_source[rest], of_source[held], sources
    taught, hidden = known.among(pool, of_source), known.among(pool, of_target)
    source = known.renumber(pool.select(taught))
    target = pool.select(of_target)
    target.labels = target.classes = None
    if config.negative_control in ("noise", "shuffled"):
        target = make_control(config.negative_control, target)
    learned = _labels(source) if classes is None else torch.arange(len(classes))
    measured, unknown = _measured(config, held_out, sources, targets, known, learned)
    if classes is not None and unknown is not None:
        raise ConfigError(
            f"`domain.target`: {pool.name} has classes that the model in {config.starts_from!r} does not know. It knows "
            f"{', '.join(classes)}: leave the others out."
        )
    return DomainSplit(config, source, target, measured, tuple(targets), unknown, pool, taught, hidden, known)


def _chosen(config: MethodConfig, pool: IndexedDataset, has_source: bool) -> tuple[list[str], list[str]]:
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


def _known(config: MethodConfig, pool: IndexedDataset, classes: tuple[str, ...] | None) -> KnownClasses:
    """A finished model's classes are in its own order; one that the pool lacks has a number that no image has."""
    assert pool.classes is not None
    if classes is not None:
        numbers = [pool.classes.index(name) if name in pool.classes else -1 for name in classes]
        if max(numbers) < 0:
            raise ConfigError(
                f"`domain.model`: the model in {config.starts_from!r} knows {', '.join(classes)}, and {pool.name} has "
                f"{', '.join(pool.classes)}: they share no class."
            )
        absent_from = len(pool.classes)
        return KnownClasses(torch.tensor([absent_from + i if n < 0 else n for i, n in enumerate(numbers)]), classes)
    if config.known is None:
        return KnownClasses(torch.arange(len(pool.classes)), pool.classes)
    absent = [name for name in config.known if name not in pool.classes]
    if absent or len(set(config.known)) < 2:
        raise ConfigError(
            f"`domain.known`: {', '.join(map(repr, absent)) or 'fewer than two'}: name two or more of {', '.join(pool.classes)}."
        )
    known = sorted(pool.classes.index(name) for name in set(config.known))
    return KnownClasses(torch.tensor(known), tuple(pool.classes[c] for c in known))


def _measured(
    config: MethodConfig,
    held_out: IndexedDataset | None,
    sources: list[str],
    targets: list[str],
    known: KnownClasses,
    taught: Tensor,
) -> tuple[dict[str, IndexedDataset], IndexedDataset | None]:
    """Per domain the images to measure on, targets first, and the target's of unknown classes."""
    if held_out is None or held_out.labels is None or held_out.domains is None or held_out.domain_names is None:
        raise ConfigError("there are no labeled images of known domains to measure on: see the keys in `configs/data`.")
    measured = {}
    for name in dict.fromkeys([*targets, *sources]):
        index = _in(held_out, [name]) if name in held_out.domain_names else torch.arange(0)
        images = held_out.select(known.among(held_out, index))
        if len(images):
            measured[name] = known.renumber(images)
    missing = [name for name in targets if name not in measured]
    if missing:
        raise ConfigError(
            f"`domain.target`: {held_out.name} has no labeled image of {', '.join(missing)} to measure on"
            + (" of the known classes." if config.known else ".")
        )
    for name in targets:
        present = set(_labels(measured[name]).tolist())
        strange = present - set(taught.tolist())
        named = ", ".join(known.names[c] for c in sorted(strange))
        if strange == present:
            raise ConfigError(
                f"`domain.target`: {name} shares no class with the source: it has {named}, and nothing could learn them."
            )
        if strange:
            raise ConfigError(
                f"`domain.target`: {name} has classes that no source image has: {named}. Leave them out, or name the classes to learn by "
                "`domain.known`: the others are then measured as unknown."
            )
    index = _in(held_out, targets)
    unknown = held_out.select(index[~torch.isin(held_out.labels[index], known.numbers) & (held_out.labels[index] >= 0)])
    return measured, unknown if len(unknown) else None


def _in(images: IndexedDataset, names: list[str]) -> Tensor:
    assert images.domains is not None
    assert images.domain_names is not None
    numbers = [images.domain_names.index(name) for name in names]
    return torch.isin(images.domains, torch.tensor(numbers, dtype=torch.int64)).nonzero()[:, 0]


def _labels(images: IndexedDataset) -> Tensor:
    assert images.labels is not None
    return images.labels


# Targets from which nothing can be learned: a gain with them does not come from the target.


def _noise(image: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, image.shape, generator=generator, dtype=torch.uint8)


def _shuffled(image: Tensor, generator: torch.Generator) -> Tensor:
    """The same colors, and no shape."""
    order = torch.randperm(image.shape[1] * image.shape[2], generator=generator)
    return image.flatten(1)[:, order].view_as(image)


_STAND_INS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"noise": _noise, "shuffled": _shuffled}


def make_control(name: Control, images: IndexedDataset) -> IndexedDataset:
    """As many images of the same sizes, the same at every call: of ``noise``, or with ``shuffled`` pixels."""
    if images.pixels is None:
        return _StandIn(name, images)
    changed = [_changed(name, number, image) for number, image in enumerate(images.pixels)]
    return ArrayDataset(
        images.name, torch.stack(changed), license=images.license, mean=images.mean, std=images.std, domains=images.domains,
        domain_names=images.domain_names,
    )  # fmt: skip


def _changed(name: str, number: int, image: Tensor) -> Tensor:
    return _STAND_INS[name](image, torch.Generator().manual_seed(derive_seed("control", name, number)))


class _StandIn(IndexedDataset):
    """For images in files."""

    def __init__(self, name: str, images: IndexedDataset, numbers: Tensor | None = None) -> None:
        self.name, self.channels, self.license = images.name, images.channels, images.license
        self.domains, self.domain_names, self.bad_files = images.domains, images.domain_names, images.bad_files
        self.mean, self.std = images.mean, images.std
        self._how, self._images = name, images
        self._numbers = torch.arange(len(images)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._images)

    def open_image(self, index: int) -> Image.Image:
        opened = as_8_bit(self._images.open_image(index), "L" if self._images.channels == 1 else "RGB")
        image = pil_to_tensor(opened)
        changed: Image.Image = to_pil_image(_changed(self._how, int(self._numbers[index]), image))
        return changed

    def describe(self, index: int) -> str:
        return self._images.describe(index)

    def fingerprint(self) -> str:
        return hashlib.blake2b(f"{self._how} {self._images.fingerprint()}".encode(), digest_size=16).hexdigest()

    def select(self, index: Tensor) -> _StandIn:
        return _StandIn(self._how, self._images.select(index), self._numbers[index])
