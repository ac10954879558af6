"""Files in a folder of images that are none: by cause, and a class that lost all of its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.verdicts import listed, warn_once

_BESIDE_IMAGES = {
    ".txt", ".md", ".rst", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml", ".ini", ".html", ".htm", ".url",
    ".pdf", ".db", ".log", ".py", ".ipynb",
}  # fmt: skip
_CAUSES = 5


@dataclass(frozen=True)
class Others:
    """Files of one folder and one ending that are not taken for images.

    Attributes:
        folder: its path below the root.
        ending: in small letters; "" for none.
        count: how many there are.
        example: one of them, by its path below the root.
    """

    folder: str
    ending: str
    count: int
    example: str


def total(others: Iterable[Others]) -> tuple[int, str]:
    """How many there are, and one of them."""
    others = list(others)
    return sum(one.count for one in others), min((one.example for one in others), default="")


def causes(others: Iterable[Others], faults: Mapping[str, str]) -> list[str]:
    """Why files are no images, a cause a phrase, the most frequent first.

    Args:
        others: files that are not taken for images.
        faults: of files that are, and can't be read, what is wrong.
    """
    count, example = Counter[str](), dict[str, str]()
    for one in others:
        phrase = f"end in {one.ending}, which is not read" if one.ending else "have no ending and hold no image"
        count[phrase] += one.count
        example.setdefault(phrase, one.example)
    for file, fault in faults.items():
        count[f"can't be read: {fault}"] += 1
        example.setdefault(f"can't be read: {fault}", file)
    return [f"{number} {phrase} ({example[phrase]})" for phrase, number in count.most_common(_CAUSES)]


def refuse_lost_folders(
    root: str,
    folders: Sequence[str],
    used: Iterable[str],
    others: Sequence[Others],
    faults: Mapping[str, str],
    levels: int,
) -> None:
    """Refuses a folder of which a class lost all its files: it would vanish from the classes without a word.

    Folders that hold nothing but texts and tables are no classes, and empty ones are said.

    Args:
        root: the folder.
        folders: all folders below it, by their paths.
        used: those that hold images.
        others: the files that are not taken for images.
        faults: by their paths below the root the images that can't be read.
        levels: how deep the folders of classes lie.

    Raises:
        ConfigError: a class did, with the causes.
    """
    there, kept = ({top for folder in group if (top := _top(folder, levels))} for group in (folders, used))
    problems, empty = [], []
    for top in sorted(there - kept):
        ours = [one for one in others if _top(one.folder, levels) == top]
        bad = {file: fault for file, fault in faults.items() if _top(file.rpartition("/")[0], levels) == top}
        if bad or any(one.ending not in _BESIDE_IMAGES for one in ours):
            problems.append(
                f"{root!r}: none of the files in {top!r} is an image: {'; '.join(causes(ours, bad))}. Convert or replace them, or "
                "move the folder out."
            )
        elif not ours:
            empty.append(top)
    if problems:
        raise ConfigError(problems)
    if empty and kept:
        warn_once(f"{root}: {listed(empty)} hold no image and are no classes.")


def _top(folder: str, levels: int) -> str:
    """The first levels of a folder's path; "" if it has fewer."""
    names = [] if folder in (".", "") else folder.split("/")
    return "/".join(names[:levels]) if len(names) >= levels else ""
