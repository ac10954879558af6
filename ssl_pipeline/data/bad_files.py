"""Files that are no images, or damaged ones: counted, named, and too many of them end the run."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BeforeValidator, Field, model_serializer

from ssl_pipeline.config.base import ConfigError, FrozenModel, UserError, shorten

T = TypeVar("T")
_log = logging.getLogger("ssl_pipeline")


@lru_cache(maxsize=4096)
def warn_once(message: str) -> None:
    """Logs a warning once in the process's life: a folder is opened for each split, an archive read again each epoch."""
    _log.warning("%s", message)


class BadFilesLimit(FrozenModel):
    """How many damaged files a run allows: a number, or a share of all files."""

    one_value: ClassVar[bool] = True
    value: float = Field(ge=0)
    share: bool

    def of(self, files: int) -> int:
        return int(self.value * files / 100) if self.share else int(self.value)

    @model_serializer
    def _as_written(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{self.value:g}%" if self.share else f"{self.value:g}"


def parse_limit(text: Any) -> Any:
    """Reads ``1%`` or ``20``."""
    if isinstance(text, BadFilesLimit):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", str(text))
    if not match or (not match[2] and "." in match[1]):
        raise ValueError(f"write a share of the files or their number, such as '1%' or '20'; got {text!r}.")
    return BadFilesLimit(value=float(match[1]), share=bool(match[2]))


Limit = Annotated[BadFilesLimit, BeforeValidator(parse_limit)]


class BadFiles:
    """The damaged files of one data set in one process.

    Args:
        limit: how many are allowed.
        files: the number of all files, the damaged ones among them.
        known: per file that was found before, what is wrong with it.
    """

    def __init__(self, limit: BadFilesLimit, files: int, known: dict[str, str] | None = None) -> None:
        self.limit, self.files, self.faults, self.allowed = limit, files, dict(known or {}), limit.of(files)

    def note(self, file: str, fault: str) -> None:
        """One more file that can't be read; the same one again does not count.

        Raises:
            ConfigError: they are too many.
        """
        if file not in self.faults:
            self.learn({file: fault})
            self.stop_if_too_many()

    def learn(self, faults: Mapping[str, str]) -> None:
        """Merges what other processes have found, and logs what is new."""
        for file, fault in faults.items():
            if file not in self.faults:
                self.faults[file] = fault
                _log.warning("%s can't be read as an image: %s. A neighbor takes its place.", file, fault)

    def stop_if_too_many(self) -> None:
        """Ends the run when more files are known to be damaged than is allowed.

        Raises:
            ConfigError: they are.
        """
        if len(self.faults) > self.allowed:
            raise ConfigError(
                [
                    *shorten([f"{file}: {fault}" for file, fault in self.faults.items()]),
                    f"{len(self.faults)} of {self.files} files can't be read as images, and `data.max_bad_files={self.limit}` "
                    f"allows {self.allowed}: remove or replace them, or raise the limit.",
                ]
            )


def for_all(paths: Sequence[Path], read: Callable[[Path], T]) -> list[T]:
    """Reads many files at once, and reports all mistakes together.

    Raises:
        ConfigError: naming the first of the files with a mistake.
    """

    def careful(path: Path) -> T | UserError:
        try:
            return read(path)
        except UserError as error:
            return error

    with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(careful, paths))
    raise_all([str(one) for one in found if isinstance(one, UserError)])
    return [one for one in found if not isinstance(one, UserError)]


def raise_all(problems: Sequence[str]) -> None:
    """Raises a ConfigError with the first of the problems, if there are any."""
    if problems:
        raise ConfigError(shorten(problems))
