"""What a word that is no key or no choice may mean, as the line to type."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ssl_pipeline.config.base import closest
from ssl_pipeline.config.compose import choice_file, choices, group_choices, verb_of_config
from ssl_pipeline.config.schema import UnknownKeyError, all_keys, find_key, is_model, module_of, names, rooms
from ssl_pipeline.config.synonyms import flat, foreign, of_accelerate, renamed
from ssl_pipeline.config.values import members

_OFF_AND_ON = dict.fromkeys(("false", "no", "none", "0", ""), "off") | dict.fromkeys(("true", "yes", "on", "1"), "auto")
_BY_SUFFIX = dict.fromkeys((".csv", ".tsv", ".parquet", ".jsonl"), "table") | dict.fromkeys(
    (".tar", ".tgz"), "webdataset"
)
_BY_SUFFIX[".json"] = "coco"
_CONFIG_OPTIONS = ("config", "config_file", "config_path", "config_name", "cfg_file", "c")


@dataclass(frozen=True)
class Stage:
    """What a command line is for; ``tree`` are its values so far, which say what components are chosen."""

    name: str
    schema: type[BaseModel]
    tree: dict[str, Any]
    config_dir: Path | None

    def keys(self) -> dict[str, Any]:
        return all_keys(self.schema, self.tree)

    def choices(self, group: str) -> list[str]:
        return choices(group, self.config_dir)


def about_choice(stage: Stage, group: str, choice: str | None) -> str | None:
    """What is wrong with the choice of a group, None for nothing of it, and what to type; None where it is right."""
    known, field = stage.choices(group), stage.schema.model_fields.get(group)
    if choice is None:
        if field is None or type(None) in members(field.annotation):
            return None
        off = " For none write `tracking=off`." if group == "tracking" else ""
        verb = verb_of_config(stage.name)
        return f"`{group}`: {verb} can't do without one: take one of {', '.join(known)}.{off}"
    if choice.startswith("[") or choice_file(group, choice, stage.config_dir):
        return None
    text = f"`{group}={choice}`: there is no such choice. Known: {', '.join(known)}."
    if group == "tracking" and choice.lower() in _OFF_AND_ON:
        return f"{text} Did you mean `tracking={_OFF_AND_ON[choice.lower()]}`?"
    if not choice:
        return f"{text} (An empty shell variable?)"
    if group == "data" and (words := _data_at(choice)):
        return f"`data={choice}`: that is a place and no kind of data. Write {_line(*words)}."
    close = closest(choice, known)
    hint = f" Did you mean `{group}={close}`?" if close else ""
    name = None if field is None else getattr(field.annotation, "model_fields", {}).get("name")
    if name is not None and name.annotation is str and group not in rooms(stage.schema):
        line = _line(f"{group}.name={choice}")
        return f"`{group}={choice}`: there is no file of that name. For a network without a file of its own write {line}. Files: {', '.join(known)}.{hint}"
    return text + hint


def about_key(stage: Stage, key: str, text: str | None) -> str:
    """An unknown key, and what it may mean; ``text`` is the value as it was typed, None for none."""
    value = "…" if text is None else text
    if line := renamed(key, value, stage.schema.model_fields):
        return line
    answer = (
        (f"If a file or folder is meant, there is no {f'{key}={value}'!r}." if "/" in key else None)
        or of_accelerate(stage.name, key, value)
        or _in_other_choice(stage, key, value)
        or _write(_meant(stage, key, value))
        or _in_other_group(stage, key, value)
        or _misspelled(stage, key, value)
    )
    return f"`{key}` is not a key. {answer}"


def about_word(stage: Stage, word: str) -> str:
    """A word without a value, such as ``num_workers`` or ``photos``."""
    if line := renamed(word, "…", stage.schema.model_fields):
        return line
    known, name = stage.keys(), word.strip("+~=")
    answer = None
    if name:
        groups = [group for group in group_choices(stage.name) if word in stage.choices(group)]
        answer = (
            (_write([(_with_value(stage, word, _example(stage, word)),)]) if word in known else None)
            or _write([(f"{group}={word}",) for group in groups])
            or _write(_at_place(stage, word))
            or of_accelerate(stage.name, word, "…")
            or _write(_meant(stage, word, "…"))
        )
    if answer:
        return f"{word!r} is not an override: {answer[:1].lower()}{answer[1:]}"
    close = closest(name, [*known, *group_choices(stage.name)], cutoff=0.75)
    hint = f" Did you mean `{close}=…`?" if close else ""
    return f"{word!r} is not an override: write `group=choice` or `key=value` (see --help for the keys).{hint}"


def about_nothing(stage: Stage, key: str) -> str:
    """``key=`` with nothing after it."""
    null = type(None) in members(find_key(stage.schema, stage.tree, key)[1])
    return f"`{key}=` has no value (an empty shell variable?): give one{f', or write `{key}=null`' if null else ''}."


def about_option(stage: Stage, option: str, value: str | None) -> str:
    """An option that a verb does not take, such as ``--lr 0.1``; ``value`` is what followed ``=`` or was the next word."""
    text = f"there is no option `{option}`."
    key, given = option.strip("-").replace("-", "_"), "true" if value is None else value
    if key in _CONFIG_OPTIONS:
        if "recipe" not in group_choices(stage.name):
            return f"{text} `--config-dir FOLDER` adds a folder of your own YAML."
        name = Path(given).stem if value else "mine"
        file = f"{shlex.quote(f'FOLDER/recipe/{name}.yaml')}, its first line `# @package _global_`"
        return f"{text} Put your YAML into a folder `recipe` ({file}), and write `--config-dir FOLDER {shlex.quote(f'recipe={name}')}`."
    try:
        find_key(stage.schema, stage.tree, key)
    except UnknownKeyError:
        return f"{text} {about_key(stage, key, value)}"
    return f"{text} Keys are written without dashes: {_line(f'{key}={given}')}."


# Lines to type


def _line(*words: str) -> str:
    return f"`{' '.join(word if word.endswith('=…') else shlex.quote(word) for word in words)}`"


def _write(lines: list[tuple[str, ...]]) -> str | None:
    return f"Write {' or '.join(_line(*line) for line in lines[:3])}." if lines else None


def _with_value(stage: Stage, key: str, value: str) -> str:
    """``key=value``; for a model the key in it that is meant, and for a duration with its unit."""
    for kind in members(stage.keys().get(key)):
        if is_model(kind) and kind.one_value:
            number = value.replace(".", "", 1).isdecimal() and "unit" in kind.model_fields
            return f"{key}={value}{' epochs' if number else ''}"
        if is_model(kind) and kind.short_for is None and key not in group_choices(stage.name):
            inner = "name" if "name" in kind.model_fields else next(iter(kind.model_fields))
            return _with_value(stage, f"{key}.{inner}", value)
    return f"{key}={value}"


def _example(stage: Stage, key: str) -> str:
    value: Any = stage.tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    return "4" if int in members(stage.keys()[key]) else "…"


def _data_at(place: str) -> tuple[str, ...] | None:
    """How images at a place are named; None where nothing is there."""
    path = Path(place).expanduser()
    kind = "folder" if path.is_dir() else _BY_SUFFIX.get(path.suffix.lower())
    if kind is None and "/" not in place and not path.exists():
        return None
    return f"data={kind or 'folder'}", f"data.path={place}"


def _at_place(stage: Stage, word: str) -> list[tuple[str, ...]]:
    place = Path(word).expanduser()
    if not place.exists():
        return []
    if "encoder" in stage.schema.model_fields and any((place / name).exists() for name in ("card.json", "config.yaml")):
        return [(f"encoder={word}",)]
    data = _data_at(word) if "data" in stage.schema.model_fields else None
    return [data] if data else []


def _meant(stage: Stage, key: str, value: str) -> list[tuple[str, ...]]:
    """Keys of that name below others, or what other programs call so: those with the fewest parts."""
    known = stage.keys()
    groups: list[tuple[str, ...]] = [
        (f"{group}={value}",) for group in group_choices(stage.name) if value in stage.choices(group)
    ]
    for word in dict.fromkeys([flat(key), flat(key.rpartition(".")[2])]):
        found = [name for name in known if flat(name) == word]
        if not found:
            if groups:
                return groups
            for line in foreign(word):
                target = line.partition("=")[0]
                if target in known or target in group_choices(stage.name):
                    return [(_with_value(stage, target, value) if line.endswith("={}") else line.format(value),)]
                if target == "data.path" and "data" in known:
                    return [_data_at(value) or ("data=folder", f"data.path={value}")]
            found = [name for name in known if flat(name).endswith(f"_{word}")]
        if found and word != "name":
            return [(_with_value(stage, name, value),) for name in found if name.count(".") == found[0].count(".")]
    return []


def _in_other_choice(stage: Stage, key: str, value: str) -> str | None:
    """A key that the chosen component lacks and others of its group have: ``data.path`` with ``data=embedded``."""
    group, _, rest = key.partition(".")
    room, chosen = rooms(stage.schema).get(group), stage.tree.get(group) or {}
    if room is None or not rest or not isinstance(chosen, Mapping):
        return None
    first, written = rest.split(".")[0], stage.choices(group)
    having = [name for name in names(room) if name in written and first in module_of(room, name).Config.model_fields]
    if not having:
        return None
    without = f"`{group}={chosen.get('name', 'null')}` has no `{rest}`"
    if key == "data.path" and (words := _data_at(value)):
        return f"{without}: write {_line(*words)}."
    best = "folder" if "folder" in having and group == "data" else having[0]
    others = f" ({', '.join(having)} have it)" if len(having) > 1 else ""
    return f"{without}{others}: write {_line(f'{group}={best}', f'{key}={value}')}."


def _in_other_group(stage: Stage, key: str, value: str) -> str | None:
    """The key of a component that is not chosen, without its group: ``queue`` of ``pretext=moco_v2``."""
    if "." in key or key == "name":
        return None
    answers = (_in_other_choice(stage, f"{group}.{key}", value) for group in rooms(stage.schema))
    return next((answer for answer in answers if answer), None)


def _misspelled(stage: Stage, key: str, value: str) -> str:
    """The key that is spelled most like this one, beside it or elsewhere; otherwise all keys beside it."""
    known = stage.keys()
    parent, _, last = key.rpartition(".")
    while parent and not any(name.startswith(f"{parent}.") for name in known):  # `optim.lr.x`: a number has no keys
        parent = parent.rpartition(".")[0]
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    if close := closest(last, beside):
        return f"Did you mean `{close}`? Write {_line(_with_value(stage, beside[close], value))}."
    anywhere = {name.rpartition(".")[2]: name for name in reversed(known)}
    if close := closest(last, anywhere, cutoff=0.75):
        return f"Did you mean {_line(_with_value(stage, anywhere[close], value))}?"
    return f"Known{f' of `{parent}`' if parent and beside else ''}: {', '.join(sorted(beside or stage.schema.model_fields))}."
