"""What a person may have meant by a word that is no key or no choice, as the line to type."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ssl_pipeline.config.compose import choice_file, choices, group_choices
from ssl_pipeline.config.keys import UnknownKeyError, all_keys, annotation_at, is_model
from ssl_pipeline.config.resolve import module_of, names, rooms
from ssl_pipeline.config.synonyms import flat, of_launcher, renamed, synonyms
from ssl_pipeline.config.words import members

_OFF_AND_ON = {
    "false": "off",
    "no": "off",
    "none": "off",
    "0": "off",
    "": "off",
    "true": "auto",
    "yes": "auto",
    "on": "auto",
    "1": "auto",
}
_BY_ENDING = {
    ".csv": "table", ".tsv": "table", ".parquet": "table", ".jsonl": "table", ".json": "coco", ".tar": "webdataset", ".tgz": "webdataset",
}  # fmt: skip


Words = tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """What a command line is for.

    Attributes:
        name: of its YAML, such as ``pretrain``.
        schema: its keys.
        tree: its values so far, which say what components are chosen.
        config_dir: a folder of the user's own YAML.
    """

    name: str
    schema: type[BaseModel]
    tree: dict[str, Any]
    config_dir: Path | None

    @property
    def verb(self) -> str:
        """As on the command line."""
        return self.name.replace("_", " ", 1)


def about_choice(stage: Stage, group: str, choice: str | None) -> str | None:
    """What is wrong with a choice of a group, and what to type; None where it is there.

    Args:
        stage: what it is for.
        group: one of the stage's.
        choice: the name of a file of it; None takes nothing of it.
    """
    known = choices(group, stage.config_dir)
    schema_field = stage.schema.model_fields.get(group)
    if choice is None:
        if schema_field is None or type(None) in members(schema_field.annotation):
            return None
        off = " For none write `tracking=off`." if group == "tracking" else ""
        return f"`{group}`: {stage.verb} can't do without one: take one of {', '.join(known)}.{off}"
    if choice.startswith("[") or choice_file(group, choice, stage.config_dir):
        return None
    told = f"`{group}={choice}`: there is no such choice. Known: {', '.join(known)}."
    if group == "tracking" and choice.lower() in _OFF_AND_ON:
        return f"{told} Did you mean `tracking={_OFF_AND_ON[choice.lower()]}`?"
    if not choice:
        return f"{told} (An empty shell variable?)"
    if group == "data" and (words := _data_words(choice)):
        return f"`data={choice}`: that is a place and no kind of data. Write {_line(words)}."
    close = difflib.get_close_matches(choice, known, n=1)
    hint = f" Did you mean `{group}={close[0]}`?" if close else ""
    name = None if schema_field is None else getattr(schema_field.annotation, "model_fields", {}).get("name")
    if name is not None and name.annotation is str and group not in rooms(stage.schema):
        line = _line(f"{group}.name={choice}")
        return f"`{group}={choice}`: there is no file of that name. For a network without a file of its own write {line}. Files: {', '.join(known)}.{hint}"
    return told + hint


def about_key(stage: Stage, key: str, text: str | None) -> str:
    """A key that there is not, and what may be meant.

    Args:
        stage: what it is for.
        key: with its dots.
        text: the value as it was typed; None where there was none.
    """
    value = "…" if text is None else text
    if line := renamed(key, value):
        return line
    told = f"`{key}` is not a key."
    if "/" in key:
        return f"{told} If a file or folder is meant, there is no {f'{key}={value}'!r}."
    for line in (of_launcher(stage.name, key, value), _of_other_choice(stage, key, value)):
        if line:
            return f"{told} {line}"
    lines = _meant(stage, key, value)
    if lines:
        return f"{told} Write {' or '.join(_line(line) for line in lines[:3])}."
    if line := _of_other_room(stage, key, value):
        return f"{told} {line}"
    parent, _, last = key.rpartition(".")
    while parent and not _children(stage, parent):  # `optim.lr.x`: a number has no keys
        parent = parent.rpartition(".")[0]
    known = _children(stage, parent)
    close = difflib.get_close_matches(last, known, n=1)
    if close:
        return f"{told} Did you mean `{close[0]}`? Write {_line(_with_value(stage, _joined(parent, close[0]), value))}."
    leaves = {name.rpartition(".")[2]: name for name in reversed(all_keys(stage.schema, stage.tree))}
    close = difflib.get_close_matches(last, leaves, n=1, cutoff=0.75)
    if close:
        return f"{told} Did you mean {_line(_with_value(stage, leaves[close[0]], value))}?"
    where = f" of `{parent}`" if parent and known else ""
    return f"`{key}` is not a key. Known{where}: {', '.join(sorted(known or stage.schema.model_fields))}."


def about_word(stage: Stage, word: str) -> str:
    """A word without a value, such as ``workers`` or ``photos``."""
    told = f"{word!r} is not an override: "
    if not word.strip("+~="):
        return f"{word!r} is not an override: write `group=choice` or `key=value` (see --help for the keys)."
    if line := renamed(word, "…"):
        return line
    known = all_keys(stage.schema, stage.tree)
    if word in known and not word.startswith("="):
        return f"{told}write {_line(_with_value(stage, word, _example(stage, word)))}."
    lines = [f"{group}={word}" for group in group_choices(stage.name) if word in choices(group, stage.config_dir)]
    if lines:
        return f"{told}write {' or '.join(map(_line, lines))}."
    if Path(word).expanduser().exists():
        if "encoder" in stage.schema.model_fields and any(
            (Path(word).expanduser() / name).exists() for name in ("card.json", "config.yaml")
        ):
            return f"{told}write {_line(f'encoder={word}')}."
        if "data" in stage.schema.model_fields and (words := _data_words(word)):
            return f"{told}write {_line(words)}."
    meant, launched = _meant(stage, word, "…"), of_launcher(stage.name, word, "…")
    if meant or launched:
        return f"{told}{launched or 'write ' + ' or '.join(map(_line, meant[:3])) + '.'}"
    close = difflib.get_close_matches(word, [*known, *group_choices(stage.name)], n=1, cutoff=0.75)
    hint = f" Did you mean `{close[0]}=…`?" if close else ""
    return f"{word!r} is not an override: write `group=choice` or `key=value` (see --help for the keys).{hint}"


def about_nothing(stage: Stage, key: str) -> str:
    """``key=`` with nothing after it."""
    nullable = type(None) in members(annotation_at(stage.schema, stage.tree, key))
    return (
        f"`{key}=` has no value (an empty shell variable?): give one{f', or write `{key}=null`' if nullable else ''}."
    )


def _line(words: str | Words) -> str:
    """Words to type, as a shell takes them."""
    shown = [words] if isinstance(words, str) else words
    return f"`{' '.join(word if word.endswith('=…') else shlex.quote(word) for word in shown)}`"


def _joined(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _with_value(stage: Stage, key: str, value: str) -> str:
    """``key=value``; of a model that has keys the one that is meant, and a duration with its unit."""
    known = all_keys(stage.schema, stage.tree)
    for kind in members(known.get(key)):
        if not is_model(kind):
            continue
        if kind.one_value:
            return (
                f"{key}={value} epochs"
                if value.replace(".", "", 1).isdecimal() and "unit" in kind.model_fields
                else f"{key}={value}"
            )
        if kind.short_for is None and key not in group_choices(stage.name):
            inner = "name" if "name" in kind.model_fields else next(iter(kind.model_fields))
            return _with_value(stage, f"{key}.{inner}", value)
    return f"{key}={value}"


def _example(stage: Stage, key: str) -> str:
    value: Any = stage.tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    return "4" if int in members(all_keys(stage.schema, stage.tree)[key]) else "…"


def _children(stage: Stage, parent: str) -> list[str]:
    known = all_keys(stage.schema, stage.tree)
    prefix = f"{parent}." if parent else ""
    return [name[len(prefix) :] for name in known if name.startswith(prefix) and "." not in name[len(prefix) :]]


def _meant(stage: Stage, key: str, value: str) -> list[Words]:
    """Lines of keys that are called so, elsewhere or in other programs: of fewest parts, and all of one length."""
    known = all_keys(stage.schema, stage.tree)
    groups_with = [group for group in group_choices(stage.name) if value in choices(group, stage.config_dir)]
    for word in dict.fromkeys([flat(key), flat(key.rpartition(".")[2])]):
        exact = [name for name in known if flat(name) == word]
        found = exact or [name for name in known if flat(name).endswith(f"_{word}")]
        if not exact and groups_with:
            return [(f"{group}={value}",) for group in groups_with]
        for line in () if exact else synonyms(word):
            target = line.partition("=")[0]
            if target in known or target in group_choices(stage.name):
                return [(_with_value(stage, target, value) if line.endswith("={}") else line.format(value),)]
            if target == "data.path" and "data" in known:
                return [_data_words(value) or ("data=folder", f"data.path={value}")]
        if found and word != "name":
            return [(_with_value(stage, name, value),) for name in found if name.count(".") == found[0].count(".")]
    return []


def _of_other_choice(stage: Stage, key: str, value: str) -> str | None:
    """A key that the chosen component lacks and others of its group have: ``data.path`` with ``data=embedded``."""
    group, _, rest = key.partition(".")
    room = rooms(stage.schema).get(group)
    chosen = stage.tree.get(group) or {}
    if room is None or not rest or not isinstance(chosen, Mapping):
        return None
    having = [name for name in names(room) if rest.split(".")[0] in module_of(room, name).Config.model_fields]
    written = [name for name in having if name in choices(group, stage.config_dir)]
    if not written:
        return None
    without = f"`{group}={chosen.get('name', 'null')}` has no `{rest}`"
    if key == "data.path" and (words := _data_words(value)):
        return f"{without}: write {_line(words)}."
    best = "folder" if "folder" in written and group == "data" else written[0]
    others = f" ({', '.join(written)} have it)" if len(written) > 1 else ""
    return f"{without}{others}: write {_line((f'{group}={best}', f'{key}={value}'))}."


def _of_other_room(stage: Stage, key: str, value: str) -> str | None:
    """A word that is the key of a component that is not chosen: ``queue`` of ``pretext=moco_v2``."""
    for group in rooms(stage.schema) if "." not in key else ():
        if key != "name" and (line := _of_other_choice(stage, f"{group}.{key}", value)):
            return line
    return None


def _data_words(place: str) -> Words | None:
    """How images at a place are named, by what it is; None where there is nothing."""
    path = Path(place).expanduser()
    kind = "folder" if path.is_dir() else _BY_ENDING.get(path.suffix.lower())
    if kind is None and "/" not in place and not path.exists():
        return None
    return f"data={kind or 'folder'}", f"data.path={place}"


def about_option(stage: Stage, option: str, value: str | None) -> str:
    """An option that a verb does not take, such as ``--lr 0.1`` or ``--config x.yaml``.

    Args:
        stage: what it is for.
        option: with its dashes.
        value: what stood after ``=`` or as the next word; None for nothing.
    """
    told = f"there is no option `{option}`."
    key, given = option.strip("-").replace("-", "_"), "true" if value is None else value
    if key in ("config", "config_file", "config_path", "config_name", "cfg_file", "c"):
        name = Path(given).stem if value else "mine"
        file = f" ({shlex.quote(f'FOLDER/recipe/{name}.yaml')}, its first line `# @package _global_`)"
        where = (
            ""
            if "recipe" not in group_choices(stage.name)
            else f" Put your YAML into a folder `recipe`{file}, and write `--config-dir FOLDER {shlex.quote(f'recipe={name}')}`."
        )
        return f"{told}{where or ' `--config-dir FOLDER` adds a folder of your own YAML.'}"
    try:
        annotation_at(stage.schema, stage.tree, key)
    except UnknownKeyError:
        return f"{told} {about_key(stage, key, value)}"
    return f"{told} Keys are written without dashes: {_line(f'{key}={given}')}."
