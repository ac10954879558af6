"""One process in a run's folder at a time."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from pathlib import Path

_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some cluster file systems are mounted without locks
_FLOCK = "hhqqi0q"  # Linux's struct flock: type, whence, start, length, process
_HELD: set[tuple[int, int]] = set()  # device and inode of the files that this process has locked


class FolderLock:
    """A folder's lock, from its making to :meth:`release` or the process's end.

    It is a POSIX record lock, which belongs to one process. A ``flock`` would belong to the open file, of which every forked
    worker holds a copy: of a run that was killed the folder would stay locked until the last of its workers noticed.

    Raises:
        BlockingIOError: another holds it, in this process or another.
        OSError: the file can't be opened.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / ".lock"
        # A process is never in its own way: what it holds it has to remember. It must not even open the file again, since
        # closing any of a file's descriptors gives its lock back.
        if path.exists() and _identity(path.stat()) in _HELD:
            raise BlockingIOError(errno.EAGAIN, "held by this process")
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._identity = _identity(os.fstat(self._file))
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                os.close(self._file)
                raise BlockingIOError(error.errno, "held by another process") from error
            logging.getLogger("ssl_pipeline").warning(
                "this file system has no locks (%s): nothing keeps a second process out of the run folder",
                error.strerror,
            )
        _HELD.add(self._identity)

    def release(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            _HELD.discard(self._identity)
            self._file = -1


def is_held(folder: Path) -> bool:
    """Whether a process is in the folder. It only asks: a lock, if for an instant, would keep a run out that starts just then."""
    path = folder / ".lock"
    try:
        if _identity(path.stat()) in _HELD:
            return True
        with path.open("rb") as file:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            found: int = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))[0]
    except OSError:  # no such file, or a file system without locks, which tells nothing
        return False
    return found != fcntl.F_UNLCK


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
