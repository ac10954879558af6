"""The commands that README and ``docs`` tell people to type.

They stand in blocks of ``bash``, in indented blocks, and in a line of text between backticks. What only a GPU or a network can run is
marked by a comment on the line before its block: ``<!-- needs a GPU -->``, ``<!-- needs a network -->``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.runs import ROOT

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NEEDS = re.compile(r"<!-- needs an? (GPU|network) -->\s*$")
_PROGRAMS = ("ssl-pipeline ", "accelerate launch ", "bash launch/", "pip install ", "python -m ")
_SPAN = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        page: where it stands, relative to the root.
        words: as the shell would pass them on; without the settings of the environment before the program.
        needs: ``GPU`` or ``network``, or nothing.
        whole: whether it stands in a block; a line of text may leave a command's end to the reader.
    """

    page: str
    words: tuple[str, ...]
    needs: str | None
    whole: bool

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def all_commands() -> list[Command]:
    """Those of README, CONTRIBUTING and all pages of ``docs``, each once a page."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return list(dict.fromkeys(command for page in pages for command in commands_of(page)))


def commands_of(page: Path) -> Iterator[Command]:
    """The commands of a page, those in blocks first."""
    text, name = page.read_text(), page.relative_to(ROOT).as_posix()
    for block in _FENCE.finditer(text):
        if block[1] in ("bash", "sh", "console"):
            marked = _NEEDS.search(text[: block.start()])
            for words in _split(block[2]):
                yield Command(name, words, marked[1] if marked else None, whole=True)
    rest = _FENCE.sub("", text)
    for line in rest.splitlines():
        if line.startswith("    ") and line.strip().startswith(_PROGRAMS):
            for words in _split(line.strip()):
                yield Command(name, words, None, whole=True)
    for span in _SPAN.findall(rest):
        if span.startswith(_PROGRAMS):
            for words in _split(span):
                yield Command(name, words, None, whole=False)


def _split(text: str) -> Iterator[tuple[str, ...]]:
    """A shell's text as commands of words: without comments, continued lines joined, split at ``&&`` and ``;``."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word in ("&&", ";", "|"):
                if words:
                    yield tuple(words)
                words = []
            elif words or not re.fullmatch(r"[A-Z_]+=.*", word):
                words.append(word)
