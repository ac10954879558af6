"""``VERB --help``, from the verb's YAML and its comments: no schema is needed, and so no torch."""

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
    """A key of a YAML file.

    Attributes:
        key: with its dots.
        value: as it is written; empty for a key that has keys.
        said: its comment.
        is_group: whether it stands in the defaults list: a group, and what is taken of it.
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
        above = [one for one in above if one[0] < indent]
        above.append((indent, found["key"]))
        yield Line(prefix + ".".join(key for _, key in above), value, said)


def has_yaml(verb: str) -> bool:
    """Whether a verb is told what to do by a configuration."""
    return (config_root() / f"{verb.replace(' ', '_')}.yaml").is_file()


def help_of(verb: str, summary: str, words: Sequence[str] = (), config_dir: Path | None = None) -> str:
    """What a verb takes: its groups with their choices, its keys with defaults and meanings, its options.

    Args:
        verb: one that has a YAML.
        summary: what it does, in a line.
        words: the rest of the command line; of each ``group=choice`` in it the keys are listed, too.
        config_dir: a folder of the user's own YAML.
    """
    lines = list(lines_of((config_root() / f"{verb.replace(' ', '_')}.yaml").read_text(encoding="utf-8")))
    groups = [line for line in lines if line.is_group and line.said]
    keys = [line for line in lines if not line.is_group]
    parts = [
        f"usage: ssl-pipeline {verb} [group=choice …] [key=value …] [--config-dir DIR] [--cfg job] [--help]", "", summary, "",
        "groups:", *(text for line in groups for text in _group(line, verb, config_dir)), "",
        "keys, and what holds without them:", *(text for line in keys for text in _key(line)), "",
    ] if groups else [
        f"usage: ssl-pipeline {verb} [key=value …] [--config-dir DIR] [--cfg job] [--help]", "", summary, "",
        "keys, and what holds without them:", *(text for line in keys for text in _key(line)), "",
    ]  # fmt: skip
    for word in words:
        group, _, choice = word.partition("=")
        file = choice_file(group, choice, config_dir)
        if file is not None and any(line.key == group for line in groups):
            text = file.read_text(encoding="utf-8")
            prefix = "" if "@package _global_" in text else f"{group}."
            parts += [
                f"keys of {word}:",
                *(part for line in lines_of(text, prefix) if not line.is_group for part in _key(line)),
                "",
            ]
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
    known = ", ".join(
        choice for choice in choices(line.key, config_dir) if line.key != "recipe" or _is_for(choice, verb)
    )
    held = textwrap.wrap(known, _WIDTH - 6, break_long_words=False, break_on_hyphens=False)
    return [*_row(f"{line.key}={line.value}", line.said), *(f"      {text}" for text in held)]


def _is_for(recipe: str, verb: str) -> bool:
    """Whether a recipe is of this verb: ours end in its name, and the user's own are anybody's."""
    ours = (config_root() / "recipe" / f"{recipe}.yaml").is_file()
    return not ours or recipe.endswith(f"_{'pretrain' if verb == 'views' else verb}")


def _key(line: Line) -> list[str]:
    if not line.value and not line.said:  # its keys say it
        return []
    return _row(f"{line.key}={line.value}" if line.value else f"{line.key}…", line.said)


def _row(name: str, said: str) -> list[str]:
    wrapped = textwrap.wrap(said, _WIDTH - _COLUMN - 2, break_long_words=False) or [""]
    if len(name) > _COLUMN - 2 and said:
        return [f"  {name}", *(f"{'':{_COLUMN + 2}}{text}" for text in wrapped)]
    return [f"  {name:<{_COLUMN}}{wrapped[0]}".rstrip(), *(f"{'':{_COLUMN + 2}}{text}" for text in wrapped[1:])]
