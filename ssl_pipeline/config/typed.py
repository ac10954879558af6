"""The command line as a person would type it: a verb's module no longer sees the verb, nor does a process of a launcher."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_WORDS: ContextVar[tuple[str, ...] | None] = ContextVar("words", default=None)


@contextmanager
def typed_as(words: Sequence[str]) -> Iterator[None]:
    """Inside, :func:`command_words` gives these words."""
    token = _WORDS.set(tuple(words))
    try:
        yield
    finally:
        _WORDS.reset(token)


def command_words() -> list[str]:
    """Such as ``ssl-pipeline pretrain recipe=simclr``; the program's own words where it calls us from Python."""
    return list(_WORDS.get() or sys.argv)
