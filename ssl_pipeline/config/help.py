"""``VERB --help``, from the verb's YAML and its comments, so that neither a schema nor torch is imported."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_pipeline.config.compose import choice_file, choices, config_root

_LINE = re.compile(
    r"(?P<indent> *)(?P<item>- )?(?P<key>[^\s#:-][^#:]*):(?: +(?P<value>[^#\s].*?))?(?: +#\s*(?P<said>.*))?"
)
_WIDTH, _COLUMN = 120, 34


@dataclass(frozen=True)
class Line:
    """A key of a YAML file: with its dots, its value as written (empty where it has keys), and its comment.

    ``is_group``: whether it is in the defaults list, so that it is a group and its default choice.
    """

    key: str
    value: str
    said: str
    is_group: bool = False


def lines_of(text: str, prefix: str = "") -> Iterator[Line]:
    """The keys of a YAML file, in its order."""
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        found = _LINE.fullmatch(line.rstrip())
        if found is None or found["key"] == "defaults":
            continue
        indent, value, said = len(found["indent"]), (found["value"] or "").strip('"'), found["said"] or ""
        if found["item"]:
            yield Line(found["key"], value, said, is_group=True)
            continue
        above = [*(one for one in above if one[0] < indent), (indent, found["key"])]
        yield Line(prefix + ".".join(key for _, key in above), value, said)


def _file_of(verb: str) -> Path:
    return config_root() / f"{re.sub('[ -]', '_', verb)}.yaml"


def has_yaml(verb: str) -> bool:
    """Whether a verb reads a configuration."""
    return _file_of(verb).is_file()


def help_of(verb: str, summary: str, words: Sequence[str] = (), config_dir: Path | None = None) -> str:
    """What a verb takes: its groups with their choices, its keys with defaults and meanings, its options.

    For each ``group=choice`` in ``words``, the rest of the command line, the keys of that choice are listed too.
    """
    lines = list(lines_of(_file_of(verb).read_text(encoding="utf-8")))
    groups = [line for line in lines if line.is_group and line.said]
    keys = [line for line in lines if not line.is_group]
    usage = f"usage: ssl-pipeline {verb} {'[group=choice …] ' if groups else ''}[key=value …] [--config-dir DIR] [--cfg job] [--help]"
    parts = [usage, "", summary, ""]
    if groups:
        parts += ["groups:", *(text for line in groups for text in _group(line, verb, config_dir)), ""]
    parts += ["keys, and what holds without them:", *_keys(keys), ""]
    for word in words:
        group, _, choice = word.partition("=")
        file = choice_file(group, choice, config_dir)
        if file is not None and any(line.key == group for line in groups):
            text = file.read_text(encoding="utf-8")
            below = lines_of(text, "" if "@package _global_" in text else f"{group}.")
            parts += [f"keys of {word}:", *_keys([line for line in below if not line.is_group]), ""]
    example = next((line for line in groups if line.value not in ("", "null")), None)
    more = f", `ssl-pipeline {verb} {example.key}={example.value} --help` those of a choice" if example else ""
    return "\n".join([
        *parts,
        "options:",
        *_row("--config-dir DIR", "a folder of your own YAML, with the same groups as ours"),
        *_row("--cfg job", "print the configuration that would run, and stop"),
        *_row("--help", f"this text; `--cfg job` shows all keys{more}"),
        "",
    ])  # fmt: skip


def _group(line: Line, verb: str, config_dir: Path | None) -> list[str]:
    recipes = (config_root() / line.key, f"_{'pretrain' if verb == 'views' else verb}")
    known = [
        choice
        for choice in choices(line.key, config_dir)
        # Our recipes end in the name of their verb; the user's own are for any.
        if line.key != "recipe" or choice.endswith(recipes[1]) or not (recipes[0] / f"{choice}.yaml").is_file()
    ]
    held = textwrap.wrap(", ".join(known), _WIDTH - 6, break_long_words=False, break_on_hyphens=False)
    return [*_row(f"{line.key}={line.value}", line.said), *(f"      {text}" for text in held)]


def _keys(lines: Sequence[Line]) -> Iterator[str]:
    for line in lines:
        if line.value or line.said:  # the others are described by their keys
            yield from _row(f"{line.key}={line.value}" if line.value else f"{line.key}…", line.said)


def _row(name: str, said: str) -> list[str]:
    wrapped = textwrap.wrap(said, _WIDTH - _COLUMN - 2, break_long_words=False) or [""]
    if len(name) > _COLUMN - 2 and said:
        return [f"  {name}", *(f"{'':{_COLUMN + 2}}{text}" for text in wrapped)]
    return [f"  {name:<{_COLUMN}}{wrapped[0]}".rstrip(), *(f"{'':{_COLUMN + 2}}{text}" for text in wrapped[1:])]
