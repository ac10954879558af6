"""What a look found, told and written down."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from ssl_pipeline.logging.progress import console, print_table

BAD_FILES = "bad_files.txt"
TOLD = 20
_NAMED = 10
_log = logging.getLogger("ssl_pipeline")


def listed(names: Sequence[str]) -> str:
    """Names for a message, cut short where there are many."""
    return ", ".join(names[:_NAMED]) + (f", … ({len(names)} in all)" if len(names) > _NAMED else "")


@lru_cache(maxsize=4096)
def warn_once(message: str) -> None:
    """Logs a warning once in the process's life: a folder is opened for each split, an archive read again each epoch."""
    _log.warning("%s", message)


def verdicts(usable: int, bad: Mapping[str, str]) -> list[tuple[str, int]]:
    """Per verdict the number of files; numbers within a verdict are left out, so that it is one."""
    kinds = Counter(re.sub(r"\d+", "N", fault) for fault in bad.values())
    return [("usable", usable), *kinds.most_common()]


def print_bad_files(title: str, usable: int, bad: Mapping[str, str], place: Path) -> None:
    """Prints the verdicts and the first bad files, and writes the whole list to a folder."""
    told = "".join(f"{file}\t{fault}\n" for file, fault in bad.items())
    (place / BAD_FILES).write_bytes(os.fsencode(told))
    print_table(title, ["verdict", "files"], [[verdict, str(count)] for verdict, count in verdicts(usable, bad)])
    for file, fault in list(bad.items())[:TOLD]:
        log_bad_files(f"  {file}: {fault}")
    if len(bad) > TOLD:
        log_bad_files(f"  … and {len(bad) - TOLD} more, in {place / BAD_FILES}")


def log_bad_files(text: str) -> None:
    """Prints a line."""
    encoding = console().encoding  # names of files may hold what a terminal, or UTF-8, can't show
    console().print(text.encode(encoding, "backslashreplace").decode(encoding), markup=False)
