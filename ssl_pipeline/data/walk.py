"""Which files of a folder are images: training, predicting and embedding all walk by this.

Hidden files and folders (``.git``, ``._photo.jpg``) are passed over, links are followed, and a folder is a folder whatever it is
named.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from ssl_pipeline.config.base import ConfigError

# Formats that Pillow names without reading them itself: other programs would have to, one of which runs what the file says.
_NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


def _endings() -> frozenset[str]:
    Image.init()
    read = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return frozenset(read - {e for e, kind in Image.registered_extensions().items() if kind in _NOT_READ} | {".mpo"})


ENDINGS = _endings()  # in small letters: all that Pillow reads


def ending_of(name: str) -> str:
    """A file's ending with its dot, in small letters; "" for none."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - a million names


def is_image_without_ending(path: Path) -> bool:
    """Whether the content of a file is an image's, for files whose name does not say."""
    try:
        if not path.is_file():
            return False
        with Image.open(path) as file:
            return file.format not in _NOT_READ
    except MemoryError:
        raise
    except Exception:  # decoders answer damaged bytes with nearly any error
        return False


def images_without_ending(paths: Iterable[Path]) -> list[bool]:
    """The same of many files, several at once."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(is_image_without_ending, paths))


def images_in(root: Path) -> list[Path]:
    """All images in and below a folder, by their names.

    Raises:
        ConfigError: a folder can't be listed.
    """
    files = [root / folder / name for folder, _, found in walk(root) for name, _, _ in found]
    unnamed = [file for file in files if not ending_of(file.name)]
    known = {file for file, is_one in zip(unnamed, images_without_ending(unnamed), strict=True) if is_one}
    return sorted(file for file in files if ending_of(file.name) in ENDINGS or file in known)


def walk(root: Path) -> Iterator[tuple[str, int, list[tuple[str, int, int]]]]:
    """Per folder its path, mtime, and visible files with their sizes and mtimes.

    Links are followed, each real folder once, so that a loop ends; of two links to one folder the same is taken on every
    machine, because folders are visited in the order of their names.

    Raises:
        ConfigError: a folder can't be listed.
    """
    seen, pending = {root.resolve()}, [root]
    while pending:
        folder = pending.pop()
        try:
            mtime = folder.stat().st_mtime_ns
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise ConfigError(
                f"{str(folder)!r} can't be listed ({error.strerror}): make it readable or take it out."
            ) from error
        below, files = [], []
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if not _is_folder(entry):
                files.append((entry.name, *_size(entry)))
            elif (real := Path(entry.path).resolve()) not in seen:
                seen.add(real)
                below.append(Path(entry.path))
        yield folder.relative_to(root).as_posix(), mtime, files
        pending += reversed(below)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: a file that can't be read, which the check of headers tells
        return False


def _size(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        found = entry.stat()
    except OSError:  # a link that leads nowhere
        return 0, 0
    return found.st_size, found.st_mtime_ns
