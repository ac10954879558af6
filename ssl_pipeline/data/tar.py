"""Samples in tar archives, as WebDataset lays them out: neighbouring members ``KEY.jpg``, ``KEY.cls`` are one sample.

Nothing is extracted to disk, and nothing is unpickled: members are read as bytes, and only those that are asked for.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import fsspec

from ssl_pipeline.config.base import ConfigError, UserError
from ssl_pipeline.data.verdicts import warn_once

_PICKLES = {"pkl", "pickle", "pyd", "pth", "pt"}
_LARGEST = 1 << 30  # bytes of a member that is read; a header may claim anything


class ShardError(UserError):
    """An archive that is missing, damaged or cut off."""


@dataclass
class Group:
    """One sample.

    Attributes:
        key: the members' common name.
        files: by their endings, in small letters, the members that were asked for.
        has_image: whether an image is among the members, read or not.
    """

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    has_image: bool = False


def read_groups(
    url: str,
    is_image: Callable[[str], bool],
    is_wanted: Callable[[str], bool],
    start: int = 0,
    refused: dict[str, str] | None = None,
) -> Iterator[Group]:
    """An archive's samples that have an image, in their order.

    Members with a path that climbs out, links, devices and pickles are left out and told, once an archive.

    Args:
        url: a file, gzipped or not, or what fsspec can open.
        is_image: whether an ending is the image's.
        is_wanted: whether members with an ending are to be read.
        start: samples to pass over; of a file that is not gzipped, their bytes are not even read.
        refused: if given, takes the names of the members that are left out, and why, instead of the log.

    Raises:
        ShardError: naming the archive and what is wrong with it.
    """
    group, place = Group(""), 0
    told, refused = refused is None, {} if refused is None else refused
    with _opened(url) as archive:
        for member in archive:
            if member.isdir():
                continue
            fault = _fault(member)
            if fault:
                refused[member.name] = fault
                continue
            path = PurePosixPath(member.name)
            stem, _, ending = path.name.partition(".")
            key, ending = (path.parent / stem).as_posix(), ending.lower()
            if key != group.key:
                if group.has_image:
                    place += 1
                    if place > start:
                        yield group
                group = Group(key)
            group.has_image |= is_image(ending)
            if place >= start and is_wanted(ending) and ending not in group.files:
                content = archive.extractfile(member)
                assert content is not None  # a regular file, see _fault
                group.files[ending] = content.read()
    if group.has_image and place >= start:
        yield group
    if refused and told:
        first = ", ".join(f"{name} ({fault})" for name, fault in list(refused.items())[:3])
        warn_once(f"{shown(url)}: left out {len(refused)} members, such as {first}")


def shown(url: str) -> str:
    """An address as it may be told: without a password, and without what signs it."""
    return re.sub(r"(?<=://)[^/@]+@", "", url).partition("?")[0] if "://" in url else url


def _fault(member: tarfile.TarInfo) -> str | None:
    """Why a member is not read, in words."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        return "its path climbs out of the archive"
    if not member.isreg():
        return "no regular file"
    if path.name.rpartition(".")[2].lower() in _PICKLES:
        return "a pickle, which could run code"
    return f"larger than {_LARGEST >> 30} GiB" if member.size > _LARGEST else None


class _Member(tarfile.TarInfo):
    """A header; the archive keeps the error that ended it, which :mod:`tarfile` hides from the second header on."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _Member:  # the parameter is named as the library names it
        try:
            return super().fromtarfile(tarfile)
        except Exception as error:
            tarfile.ended_by = error  # type: ignore[attr-defined]
            raise


@contextmanager
def _opened(url: str) -> Iterator[tarfile.TarFile]:
    """An archive, held to its end mark once it has been read."""
    local = "://" not in url and "::" not in url
    try:
        if local and not url.lower().endswith((".gz", ".tgz")):
            with tarfile.open(url, "r:", tarinfo=_Member) as archive:
                yield archive
                _check_end(archive)
        else:
            with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as archive:
                yield archive
                _check_end(archive)
    except ImportError as error:  # the file system's own package
        raise ConfigError(f"{shown(url)} can't be opened: {error}") from error
    except FileNotFoundError as error:
        raise ShardError(f"{shown(url)} is not there: see `data.path`.") from error
    except UserError:
        raise
    except Exception as error:  # damaged bytes and file systems far away answer with nearly any error
        if local and Path(url).is_file() and Path(url).stat().st_size == 0:
            raise ShardError(f"{shown(url)} is empty: copy it anew.") from error
        reason = str(error).replace(url, shown(url))
        raise ShardError(f"{shown(url)} can't be read as a whole tar archive ({reason}): copy it anew.") from error


def _check_end(archive: tarfile.TarFile) -> None:
    error = getattr(archive, "ended_by", None)
    if not isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]  # the stubs lack it
        raise tarfile.ReadError(f"it ends without its end mark, {error or 'within a member'}")
