"""WebDataset shards: tar archives of images, local or wherever fsspec reaches, read from front to back."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import fsspec

from ssl_pipeline.config.base import ConfigError, joined
from ssl_pipeline.data.bad_files import warn_once
from ssl_pipeline.data.columns import class_name, class_number, refuse_several, text_of
from ssl_pipeline.data.decode import DecodeError, decode
from ssl_pipeline.data.encoded import Sample, StreamDataset
from ssl_pipeline.data.scan import ENDINGS
from ssl_pipeline.data.source import StreamConfig
from ssl_pipeline.data.splits import Split, split_named
from ssl_pipeline.data.tar import Group, ShardError, not_supported, read_groups, shown

_ARCHIVES = (".tar", ".tar.gz", ".tgz")


class Config(StreamConfig):
    """Tar archives whose neighboring members ``KEY.jpg``, ``KEY.cls`` are one sample. Write samples in random order.

    Attributes:
        path: an archive, a folder of them, or a pattern such as ``train-{0000..0099}.tar`` or ``train-*.tar``; several of
            them as a list. A URL is read by fsspec (``s3://`` needs s3fs, ``gs://`` gcsfs, ``https://`` aiohttp).
        val: archives of labeled images for choices, written as ``path``; null: there are none, and no kNN accuracy is measured.
        test: archives of labeled images for the final results, written as ``path``; null: there are none.
        image: the ending of the image's member; ``auto``: that of any image file.
        label: the ending of the label's member, a number or a class's name; ``json:KEY``: a key of the member ``.json``;
            null reads none.
        domain: the ending, or ``json:KEY``, of the name of an image's domain; null reads none.
        classes: their names, in the order of the numbers; null: not declared, then labels must be numbers.
    """

    path: str | tuple[str, ...]
    val: str | tuple[str, ...] | None = None
    test: str | tuple[str, ...] | None = None
    image: str = "auto"
    label: str | None = "cls"
    domain: str | None = None
    classes: tuple[str, ...] | None = None

    def open_stream(self, split: Split = "train") -> TarStream:
        key = "path" if split == "train" else split
        return self.configured(TarStream(self, key, getattr(self, key)))

    def has_split(self, split: Split) -> bool:
        return getattr(self, split) is not None


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
        self.classes, self.license, self.has_domains = config.classes, config.license, config.domain is not None
        self._sizes: dict[int, int] = {}

    @property
    def folder(self) -> Path:
        """Where the first archive lies."""
        return Path(shown(self._urls[0])).parent

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
                yield Sample(position, data, class_number(label, self.classes, "label", name), name, domain)
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
    """The text of a member, or the value of a JSON key; None where there is none, or ``wanted`` names none."""
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
