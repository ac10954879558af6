"""Samples in tar archives in WebDataset's layout: neighboring members ``KEY.jpg``, ``KEY.cls`` are one sample.

Nothing is extracted to disk and nothing is unpickled: members are read as bytes, and only those that are wanted.
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
from ssl_pipeline.data.bad_files import warn_once

_PICKLES = {"pkl", "pickle", "pyd", "pth", "pt"}
_LARGEST = 1 << 30  # bytes of a member that is read; a header may claim anything
_NOT_SUPPORTED = {
    b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7z", b"Rar!": "rar",
}  # fmt: skip
_ENDINGS_NOT_SUPPORTED = (".bz2", ".tbz", ".tbz2", ".xz", ".txz", ".zip", ".zst", ".7z", ".rar", ".lz4")


class ShardError(UserError):
    """An archive that is missing, damaged or cut off."""


@dataclass
class Group:
    """One sample.

    Attributes:
        key: the members' common name.
        files: the wanted members by their endings in lower case.
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

    A member belongs to the sample of its name before the last dot, so ``v1.0.png`` and ``v1.1.png`` are two; but to that before
    the first dot if an ending with a dot is wanted (``seg.png``), or if it can't be a sample of its own. Members with a path
    that climbs out, links, devices and pickles are left out and logged once per archive; hidden ones (``._0.jpg``) are ignored.

    Args:
        url: a file, gzipped or not, or what fsspec can open.
        is_image: whether an ending is the image's.
        is_wanted: whether members with an ending are read.
        start: samples to pass over; the bytes of those in a file that is not gzipped are not even read.
        refused: takes the names of the members that are left out, and why, instead of the log.

    Raises:
        ShardError: naming the archive and what is wrong with it.
    """
    logs, refused = refused is None, {} if refused is None else refused
    place, seen = 0, dict[str, bool]()

    def reads(entry: _Entry, stems: int) -> bool:
        # A bundle is nearly always one sample; of several, those before the start may be read for nothing.
        return place + stems > start and (is_wanted(entry.last) or is_wanted(entry.full))

    for bundle in _bundles(url, refused, reads):
        for group in _samples_of(bundle, is_image, is_wanted, refused):
            _check_neighbors(group, seen, url)
            place += group.has_image
            if group.has_image and place > start:
                yield group
    if refused and logs:
        first = ", ".join(f"{name} ({fault})" for name, fault in list(refused.items())[:3])
        warn_once(f"{shown(url)}: left out {len(refused)} members, such as {first}")


class _Entry:
    """A member of an archive, its name split at the first dot (``base``, ``full``) and at the last (``stem``, ``last``)."""

    def __init__(self, name: str) -> None:
        path = PurePosixPath(name)
        base, _, full = path.name.partition(".")
        stem, _, last = path.name.rpartition(".")
        self.name, self.full, self.last = name, full.lower(), last.lower() if stem else ""
        self.base, self.stem = (path.parent / base).as_posix(), (path.parent / (stem or base)).as_posix()
        self.content: bytes | None = None


def _bundles(url: str, refused: dict[str, str], reads: Callable[[_Entry, int], bool]) -> Iterator[list[_Entry]]:
    """Neighboring members whose names are alike up to their first dot; each is read when it comes, or never."""
    bundle = list[_Entry]()
    with _opened(url) as archive:
        for member in archive:
            if member.isdir() or _is_hidden(member.name):
                continue
            fault = _fault(member)
            if fault:
                refused[member.name] = fault
                continue
            entry = _Entry(member.name)
            if bundle and entry.base != bundle[0].base:
                yield bundle
                bundle = []
            bundle.append(entry)
            if reads(entry, len({one.stem for one in bundle})):
                content = archive.extractfile(member)
                assert content is not None  # a regular file, see _fault
                entry.content = content.read()
    if bundle:  # an archive that is cut off may lack a part of its last sample
        yield bundle


def _samples_of(
    bundle: list[_Entry], is_image: Callable[[str], bool], is_wanted: Callable[[str], bool], refused: dict[str, str]
) -> Iterator[Group]:
    """The samples of a bundle: ``0.jpg, 0.seg.png`` is one, ``v1.0.jpg, v1.1.jpg`` are two."""
    base = bundle[0].base
    by_stem: dict[str, list[tuple[str, _Entry]]] = {}
    for entry in bundle:
        asked_for = "." in entry.full and (is_image(entry.full) or is_wanted(entry.full))
        stem, ending = (base, entry.full) if asked_for else (entry.stem, entry.last)
        by_stem.setdefault(stem, []).append((ending, entry))
    for stem, entries in by_stem.items():
        images = [entry for ending, entry in entries if is_image(ending)]
        numbered = stem.removeprefix(f"{base}.").replace(".", "").isdecimal()
        if stem != base and base in by_stem and len(images) == len(entries) and not numbered:
            refused |= {entry.name: f"another image of sample {base!r}: see `data.image`" for entry in images}
            continue
        group = Group(stem, has_image=bool(images))
        for ending, entry in entries:
            if entry.content is not None and is_wanted(ending):
                group.files.setdefault(ending, entry.content)
        yield group


def _check_neighbors(group: Group, seen: dict[str, bool], url: str) -> None:
    """Refuses an archive in which a sample's image and its label lie apart; ``seen`` says which samples had an image."""
    if group.key in seen and not (group.has_image and seen[group.key]):
        raise ShardError(
            f"{shown(url)}: the members of sample {group.key!r} do not lie next to each other, so its image and its label are not "
            "found together: pack it in the order of the names (tar --sort=name)."
        )
    seen[group.key] = group.has_image


def not_supported(url: str) -> str | None:
    """Why an archive can't be read although nothing is wrong with it; None where it may be."""
    kind = next((ending for ending in _ENDINGS_NOT_SUPPORTED if shown(url).lower().endswith(ending)), None)
    if kind is None and Path(url).is_file():
        with Path(url).open("rb") as file:
            start = file.read(8)
        kind = next((name for mark, name in _NOT_SUPPORTED.items() if start.startswith(mark)), None)
    if kind is None:
        return None
    return f"{shown(url)}: archives of the kind {kind} are not supported: pack the files as .tar or .tar.gz."


def shown(url: str) -> str:
    """An address for messages: without a password, and without a signature."""
    return re.sub(r"(?<=://)[^/@]+@", "", url).partition("?")[0] if "://" in url else url


def _is_hidden(name: str) -> bool:
    """Whether it is what other systems leave in archives: ``._0.jpg``, ``.DS_Store``, ``__MACOSX``."""
    return any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in PurePosixPath(name).parts)


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
    """A header that keeps the error which ended the archive: :mod:`tarfile` hides it from the second header on."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _Member:  # the parameter is named as the library names it
        try:
            return super().fromtarfile(tarfile)
        except Exception as error:
            tarfile.ended_by = error  # type: ignore[attr-defined]
            raise


@contextmanager
def _opened(url: str) -> Iterator[tarfile.TarFile]:
    """An archive; one that ends without its end mark is cut off."""
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
