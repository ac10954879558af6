"""Files that are written whole or not at all, and folders that must be there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ssl_pipeline.config.base import ConfigError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a temporary path in the same folder to write to; it replaces ``path`` when the block ends without an error.

    The content is on the disk before it gets its name, so a crash or a power cut leaves the old file or the new one, never a
    part. After an error the temporary file is deleted: a full disk has that much room again.

    Raises:
        OSError: the file can't be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # some file systems can't flush a folder
        flush(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def existing_folder(given: str, key: str, holds: str = "the images") -> Path:
    """A folder of the user's, resolved, so that what is cached for it outlives a change of the working directory.

    Raises:
        ConfigError: there is none.
    """
    path = Path(given).expanduser()
    if not path.is_dir():
        what = "is a file, and a folder is needed" if path.exists() else "does not exist"
        raise ConfigError(f"`{key}`: {given!r} {what}: give the folder that holds {holds}.")
    return path.resolve()


def flush(path: Path) -> None:
    """Waits until a file, or a folder with the names in it, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
