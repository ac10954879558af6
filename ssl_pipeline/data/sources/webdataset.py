"""WebDataset shards: tar archives of images, local or wherever fsspec reaches, read from front to back."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

import fsspec
from pydantic import Field

from ssl_pipeline.config.base import ConfigError, joined
from ssl_pipeline.data.bad_files import warn_once
from ssl_pipeline.data.columns import class_name, refuse_several, text_of
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.decode import DecodeError, decode
from ssl_pipeline.data.encoded import InMemoryDataset, Sample, StreamDataset
from ssl_pipeline.data.reading import channels_of
from ssl_pipeline.data.scan import ENDINGS
from ssl_pipeline.data.source import LOOKED_AT, Part, Split, StreamConfig
from ssl_pipeline.data.splits import split_named
from ssl_pipeline.data.tar import Group, ShardError, not_supported, read_groups, shown

_ARCHIVES = (".tar", ".tar.gz", ".tgz")


class Config(StreamConfig):
    """Tar archives whose neighboring members ``KEY.jpg``, ``KEY.cls`` are one sample. Write samples in random order.

    Attributes:
        path: an archive, a folder of them, or a pattern such as ``train-{0000..0099}.tar`` or ``train-*.tar``; several of
            them as a list. A URL is read by fsspec (``s3://`` needs s3fs, ``gs://`` gcsfs, ``https://`` aiohttp).
        val: likewise, labeled images for choices; null: there are none, and no kNN accuracy is measured.
        test: likewise.
        max_val_images: most images of ``val`` and of ``test`` that are read, into memory.
        length: samples in all of ``path``; null: unknown, then the run's length is given as ``steps``.
        image: the ending of the image's member; ``auto``: that of any image file.
        label: the ending of the label's member, a number or a class's name; ``json:KEY``: a key of the member ``.json``;
            null reads none.
        domain: likewise, the name of where an image is from.
        classes: their names, in the order of the numbers; null: not declared, then labels must be numbers.
        channels: 3 for RGB, 1 for grayscale; null: 1 where the first images are all grayscale.
        shuffle_buffer: samples that a process holds to deal them out in a random order.
        on_error: a damaged archive or image ``stop`` the run, or what can't be read is left out (``skip``).
        license: of the images, where you know it.
    """

    path: str | tuple[str, ...]
    val: str | tuple[str, ...] | None = None
    test: str | tuple[str, ...] | None = None
    max_val_images: int = Field(5000, ge=1)
    length: int | None = Field(None, ge=2)
    image: str = "auto"
    label: str | None = "cls"
    domain: str | None = None
    classes: tuple[str, ...] | None = None
    channels: Literal[1, 3] | None = None
    shuffle_buffer: int = Field(4096, ge=1)
    on_error: Literal["stop", "skip"] = "stop"
    license: str | None = None

    def open_stream(self) -> TarStream:
        """The training images.

        Raises:
            ConfigError: there are no archives, or no image in the first.
        """
        return TarStream(self, "path", self.path)

    def open_part(self, part: Part) -> IndexedDataset | None:
        """``val`` and ``test``, labeled and held in memory.

        Raises:
            ConfigError: it is the training images that are asked for, or the images have no labels.
        """
        if part == "train" or part == "pool":
            raise self.refuse_numbers()
        given = getattr(self, part)
        return None if given is None else _held(self, part, given)


@lru_cache(maxsize=4)
def _held(config: Config, split: Split, given: str | tuple[str, ...]) -> InMemoryDataset:
    channels = config.channels or config.open_stream().channels  # of the images that the network reads
    stream = TarStream(config.model_copy(update={"channels": channels}), split, given)
    held = stream.preview(config.max_val_images)
    if held.labels is None:
        raise ConfigError(
            f"`data.{split}`: its images need labels (`data.label`) and `data.classes` their names, as nothing can be measured "
            "without."
        )
    return held


class TarStream(StreamDataset):
    """See :class:`Config`.

    Args:
        config: the source's.
        key: which key of it names the archives.
        given: the archives.
    """

    def __init__(self, config: Config, key: str, given: str | tuple[str, ...]) -> None:
        self._config, self._urls = config, _expand(key, given)
        self.name = shown(given) if isinstance(given, str) else f"{shown(given[0])}, …"
        self.shards = _names(self._urls)
        self.classes, self.length, self.license = config.classes, config.length, config.license
        self.has_domains = config.domain is not None
        self.block, self.skip_unreadable = config.shuffle_buffer, config.on_error == "skip"
        self._sizes: dict[int, int] = {}
        self.channels = config.channels or self._channels()

    @property
    def folder(self) -> Path:
        """Where the first archive lies."""
        return Path(shown(self._urls[0])).parent

    def _channels(self) -> int:
        every = itertools.chain.from_iterable(self.read(i) for i in range(len(self._urls)))
        first = list(itertools.islice(every, LOOKED_AT))
        if not first:
            raise ConfigError(
                f"{self.name} holds no image: members must be named KEY.jpg, KEY.png, … (see `data.image`)."
            )
        return channels_of(first)

    def _is_image(self, ending: str) -> bool:
        return f".{ending}" in ENDINGS if self._config.image == "auto" else ending == self._config.image

    def _is_wanted(self, ending: str) -> bool:
        members = {key.partition(":")[0] for key in (self._config.label, self._config.domain) if key is not None}
        return self._is_image(ending) or ending in members

    def read(self, shard: int, start: int = 0) -> Iterator[Sample]:
        """An archive's samples; those before the cut if it is cut off and skipped."""
        url, config = self._urls[shard], self._config
        try:
            for position, group in enumerate(read_groups(url, self._is_image, self._is_wanted, start), start):
                name = f"{shown(url)}/{group.key}"
                data = next(data for ending, data in group.files.items() if self._is_image(ending))
                label, domain = _text(group, config.label, "label", name), _text(group, config.domain, "domain", name)
                number = None if label is None else _number(label, self.classes, name)
                yield Sample(position, data, number, name, domain)
        except ShardError as error:
            if not self.skip_unreadable:
                raise
            warn_once(f"{error} The rest of it is left out.")

    def size(self, shard: int) -> int:
        """Counted by the archive's headers, once."""
        if shard not in self._sizes:
            count = 0
            try:
                for _ in read_groups(self._urls[shard], self._is_image, lambda ending: False):
                    count += 1
            except ShardError:
                if not self.skip_unreadable:
                    raise
            self._sizes[shard] = count
        return self._sizes[shard]

    def examine(self, shard: int) -> tuple[int, dict[str, str]]:
        """Decodes an archive's images.

        Returns:
            How many are usable, and by name what is wrong with those that are not, with members that are not read and with a
            damaged archive.
        """
        url, usable = self._urls[shard], 0
        faults, refused = dict[str, str](), dict[str, str]()
        try:
            for group in read_groups(url, self._is_image, self._is_image, refused=refused):
                ending, data = next(iter(group.files.items()))
                name = f"{shown(url)}/{group.key}.{ending}"
                try:
                    decode(Path(name), 3, 1, (0.0, 1.0), data)  # a JPEG at an eighth of its size, to its end
                    usable += 1
                except DecodeError as error:
                    faults[name] = error.fault
        except ShardError as error:
            faults[shown(url)] = str(error)
        return usable, faults | {f"{shown(url)}/{name}": f"not read: {fault}" for name, fault in refused.items()}

    def fingerprint(self) -> str:
        """Of the archives' names and, of files, their sizes."""
        digest = hashlib.blake2b(digest_size=16)
        for name, url in zip(self.shards, self._urls, strict=True):
            size = Path(url).stat().st_size if Path(url).is_file() else -1
            digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()


def _text(group: Group, wanted: str | None, key: str, name: str) -> str | None:
    """The text of a member, or the value of a JSON key; None where there is none.

    Args:
        group: a sample's members.
        wanted: the member's ending, or ``json:KEY``; None reads none.
        key: the configuration's key that says so.
        name: the sample's, for messages.
    """
    if wanted is None:
        return None
    ending, _, field = wanted.partition(":")
    if ending not in group.files:
        return None
    if not wanted.startswith("json:"):
        return class_name(group.files[ending].decode(errors="replace"))
    try:
        value = json.loads(group.files[ending])[field]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{name}.json has no key {field!r}: see `data.{key}`.") from error
    refuse_several(value, wanted, f"{name}.json")
    return class_name(text_of(value))


def _number(text: str, classes: tuple[str, ...] | None, name: str) -> int:
    """A label's number: a class's name, or a whole number below the number of classes."""
    if classes is not None and text in classes:
        return classes.index(text)
    whole = re.fullmatch(r"(\d+)(?:\.0*)?", text)
    if whole and (classes is None or int(whole[1]) < len(classes)):
        return int(whole[1])
    known = f"one of {', '.join(classes[:10])}" if classes else "a whole number (or declare `data.classes`)"
    raise ConfigError(f"{name}: its label is {text[:40]!r}, and {known} was expected.")


def _expand(key: str, given: str | tuple[str, ...]) -> list[str]:
    """The archives that a path, a folder, a pattern or a list of them means, each once."""
    found: list[str] = []
    for pattern in [given] if isinstance(given, str) else given:
        if pattern.startswith("pipe:"):
            raise ConfigError(f"`data.{key}`: {pattern!r} would run a command: give a file or a URL.")
        for url in _braces(pattern):
            archives = _archives(url, key)
            refused = [fault for archive in archives or _others(url) if (fault := not_supported(archive)) is not None]
            if refused:
                raise ConfigError(f"`data.{key}`: {refused[0]}")
            if not archives:
                raise ConfigError(
                    f"`data.{key}`: {url!r} is no archive, folder of archives or pattern that fits any ({', '.join(_ARCHIVES)})."
                )
            found += archives
    return list(dict.fromkeys(found))


def _archives(url: str, key: str) -> list[str]:
    if "://" in url or "::" in url:
        if "*" not in url:
            return [url]
        try:
            files, path = fsspec.core.url_to_fs(url)
            return [str(files.unstrip_protocol(name)) for name in sorted(files.glob(path))]
        except (ImportError, OSError, ValueError) as error:
            raise ConfigError(
                f"`data.{key}`: {shown(url)!r} can't be listed: {str(error).replace(url, shown(url))}"
            ) from error
    path = Path(url).expanduser()
    if path.is_dir():
        return _training_archives(path, key)
    if path.is_file():
        return [str(path.resolve())]
    return sorted(str(Path(file).resolve()) for file in glob.glob(str(path)))  # noqa: PTH207 - Path.glob takes no absolute pattern


def _others(url: str) -> list[str]:
    """The files of a folder that holds no archive."""
    path = Path(url).expanduser()
    return [str(file) for file in sorted(path.iterdir()) if file.is_file()] if path.is_dir() else []


def _training_archives(folder: Path, key: str) -> list[str]:
    """A folder's archives; for training without those that are named for another split, which is said."""
    found = sorted(file for file in folder.iterdir() if file.name.lower().endswith(_ARCHIVES) and file.name[0] != ".")
    splits = [split_named(re.split(r"[^a-z]", file.name.lower())[0]) for file in found]
    others = [file.name for file, split in zip(found, splits, strict=True) if split in ("val", "test")]
    if key == "path" and "train" in splits and others:
        warn_once(
            f"{folder}: {joined(others)} are named for another split and not trained on: measure on them by "
            "`data.val=PATTERN` and `data.test=PATTERN`."
        )
        found = [file for file in found if file.name not in others]
    return [str(file.resolve()) for file in found]


def _braces(pattern: str) -> list[str]:
    """``a-{08..11}.tar`` as its four names, ``{a,b}.tar`` as its two."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    inside = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if inside:
        low, high, width = int(inside[1]), int(inside[2]), len(inside[1])
        words = [f"{number:0{width}}" for number in range(low, high + 1)]
    else:
        words = match[1].split(",")
    return [full for word in words for full in _braces(pattern[: match.start()] + word + pattern[match.end() :])]


def _names(urls: list[str]) -> tuple[str, ...]:
    """The archives' names without the place that they share, so that a copy elsewhere has the same ids."""
    folders = [url.rsplit("/", 1)[0].split("/") for url in urls]
    levels = zip(*folders, strict=False)  # as far as the shallowest goes
    shared = sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, levels))
    return tuple("/".join(url.split("/")[shared:]) for url in urls)
