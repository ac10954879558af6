"""Which files of a folder are images: training, prediction and embedding all walk by this.

Hidden files and folders (``.git``, ``._photo.jpg``) are skipped, links are followed, and a folder is a folder whatever its name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.bad_files import IgnoredFiles

# Formats that Pillow names without reading them itself: other programs would have to, one of which runs what the file says.
_NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
Found = tuple[str, int, int, int]  # a path below the root, size, mtime in ns, number of the folder


def _endings() -> frozenset[str]:
    Image.init()
    formats = Image.registered_extensions()
    return frozenset(e for e, form in formats.items() if form in Image.OPEN and form not in _NOT_READ) | {".mpo"}


ENDINGS = _endings()  # in lower case: all that Pillow reads


def _has_image_content(path: Path) -> bool:
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


def list_images(root: Path) -> tuple[dict[str, int], list[Found], list[IgnoredFiles]]:
    """All folders below a root with their mtimes, its images sorted by path, and the other files.

    Raises:
        ConfigError: a folder can't be listed.
    """
    folders, found, unnamed = dict[str, int](), list[Found](), list[Found]()
    ignored = dict[tuple[str, str], list[str]]()
    for number, (folder, mtime, files) in enumerate(_walk(root)):
        folders[folder] = mtime
        for name, size, changed in files:
            file = (name if folder == "." else f"{folder}/{name}", size, changed, number)
            ending = os.path.splitext(name)[1].lower()  # noqa: PTH122 - a million names
            if ending in ENDINGS:
                found.append(file)
            elif not ending:
                unnamed.append(file)
            else:
                ignored.setdefault((folder, ending), []).append(file[0])
    with ThreadPoolExecutor(16) as pool:
        are_images = pool.map(_has_image_content, [root / file[0] for file in unnamed])
        for file, is_image in zip(unnamed, are_images, strict=True):
            if is_image:
                found.append(file)
            else:
                ignored.setdefault((list(folders)[file[3]], ""), []).append(file[0])
    return folders, sorted(found), [IgnoredFiles(*where, len(names), min(names)) for where, names in ignored.items()]


def images_in(root: Path) -> list[Path]:
    """All images in and below a folder, by their paths.

    Raises:
        ConfigError: a folder can't be listed.
    """
    return sorted(root / file[0] for file in list_images(root)[1])


def _walk(root: Path) -> Iterator[tuple[str, int, list[tuple[str, int, int]]]]:
    """Per folder its path, mtime, and visible files with their sizes and mtimes.

    Each real folder is visited once, so that a loop of links ends; of two links to one folder the same is taken on every
    machine, because folders are visited in the order of their names.
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
            try:
                is_folder, stat = entry.is_dir(), entry.stat()
                size, changed = stat.st_size, stat.st_mtime_ns
            except (
                OSError
            ):  # a link to itself or to nowhere: a file that can't be read, which the check of headers reports
                is_folder, size, changed = False, 0, 0
            if not is_folder:
                files.append((entry.name, size, changed))
            elif (real := Path(entry.path).resolve()) not in seen:
                seen.add(real)
                below.append(Path(entry.path))
        yield folder.relative_to(root).as_posix(), mtime, files
        pending += reversed(below)
