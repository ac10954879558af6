"""Files that turn out to be damaged: counted, named once, and too many of them end the run."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_serializer

from ssl_pipeline.config.base import ConfigError, FrozenModel

TOLD = 10
_log = logging.getLogger("ssl_pipeline")


class BadFilesLimit(FrozenModel):
    """How many damaged files a run bears: a number, or a share of all files."""

    one_value: ClassVar[bool] = True
    value: float = Field(ge=0)
    share: bool

    def of(self, files: int) -> int:
        """The number of files borne, of so many."""
        return int(self.value * files / 100) if self.share else int(self.value)

    @model_serializer
    def _as_written(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{self.value:g}%" if self.share else f"{self.value:g}"


def parse_limit(text: Any) -> Any:
    """Reads ``1%`` or ``20``; anything else is refused in words."""
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
        limit: how many are borne.
        files: of how many, the damaged ones among them.
        known: per file that was found before, what is wrong with it.

    Attributes:
        faults: per file what is wrong with it.
        allowed: the number that is borne.
    """

    def __init__(self, limit: BadFilesLimit, files: int, known: dict[str, str] | None = None) -> None:
        self.limit, self.files, self.faults, self.allowed = limit, files, dict(known or {}), limit.of(files)

    def note(self, file: str, fault: str) -> None:
        """One more file that can't be read; the same one again does not count.

        Raises:
            ConfigError: they are too many, with the list.
        """
        if file not in self.faults:
            self.learn({file: fault})
            self.stop_if_too_many(len(self.faults))

    def learn(self, faults: Mapping[str, str]) -> None:
        """Takes on what other processes have found; the main one tells it."""
        for file, fault in faults.items():
            if file not in self.faults:
                self.faults[file] = fault
                _log.warning("%s can't be read as an image: %s. A neighbor takes its place.", file, fault)

    def stop_if_too_many(self, count: int) -> None:
        """Ends the run when ``count`` files, over all processes, are more than is borne.

        Raises:
            ConfigError: they are; it lists those of this process.
        """
        if count > self.allowed:
            raise ConfigError(
                [
                    *self.listed(),
                    f"{count} of {self.files} files can't be read as images, and `data.bad_files={self.limit}` bears "
                    f"{self.allowed}: remove or replace them, or raise the limit.",
                ]
            )

    def listed(self) -> list[str]:
        """The first of them, one sentence each."""
        told = [f"{file}: {fault}" for file, fault in list(self.faults.items())[:TOLD]]
        more = len(self.faults) - TOLD
        return [*told, *([f"… and {more} more"] if more > 0 else [])]
