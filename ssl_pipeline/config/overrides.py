"""What a command line changes of a composed configuration: choices of groups first, then keys, each read by its type."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ssl_pipeline.config.base import ConfigError, flatten
from ssl_pipeline.config.compose import composed, group_choices, groups, literal, resolved
from ssl_pipeline.config.hints import Stage, about_choice, about_key, about_nothing, about_word
from ssl_pipeline.config.keys import UnknownKeyError, annotation_at, path_of, short_for
from ssl_pipeline.config.words import members, quoted, read_value

_log = logging.getLogger("ssl_pipeline")


@dataclass(frozen=True)
class Words:
    """A command line's words by what they are.

    Attributes:
        choices: what is taken of groups, by their names; None for nothing.
        raw: choices in the rest of Hydra's grammar, such as ``+group=choice`` of a group of the user's own.
        settings: keys and their values as they were typed; None takes back what was set.
        others: words that are neither.
    """

    choices: dict[str, str | None] = field(default_factory=dict)
    raw: list[str] = field(default_factory=list)
    settings: list[tuple[str, str | None]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def overridden(
    name: str, schema: type[BaseModel], overrides: Sequence[str], config_dir: Path | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The plain values of a stage: ``configs/<name>.yaml``, the chosen groups, and the keys that were set.

    Args:
        name: of the YAML.
        schema: says which keys there are and how their values are read.
        overrides: ``group=choice``, ``key=value`` and ``~key``, as they were typed.
        config_dir: a folder of the user's own YAML.

    Returns:
        The values, and what is wrong with them: a sentence each.

    Raises:
        ConfigError: the configuration can't be composed.
    """
    words = _sorted_out(name, overrides, config_dir)
    stage = Stage(name, schema, {}, config_dir)
    wrong = [text for group, choice in words.choices.items() if (text := about_choice(stage, group, choice))]
    if wrong:
        raise ConfigError([*wrong, *(about_word(stage, word) for word in words.others)])
    found = composed(name, _selections(name, words), config_dir)
    tree = copy.deepcopy(found.tree)
    for group in (group for group, choice in words.choices.items() if choice is None):
        tree.pop(group, None)
    stage = replace(stage, tree=tree)
    problems = [about_word(stage, word) for word in words.others]
    problems += _set_all(stage, words.settings, _Defaults(name, found.choices, config_dir))
    _settle_rivals(schema, tree, dict(words.settings))
    problems += _strangers(stage)
    return resolved(tree), problems


def _sorted_out(name: str, overrides: Sequence[str], config_dir: Path | None) -> Words:
    words, taken = Words(), group_choices(name)
    known = groups(config_dir)
    for override in overrides:
        key, equals, text = override.partition("=")
        bare, removed = key.strip().lstrip("+~"), key.startswith("~")
        if not bare or not (equals or removed):
            words.others.append(override)
        elif "@" in bare or (bare not in taken and key.startswith("+") and bare.split("/")[0] in known):
            words.raw.append(override)
        elif bare in taken:
            words.choices[bare] = None if removed or text.lower() == "null" else text.removesuffix(".yaml")
        else:
            words.settings.append((bare, None if removed else text))
    return words


def _selections(name: str, words: Words) -> list[str]:
    """Choices as Hydra reads them; nothing is said of a group of which nothing is taken anyway."""
    taken = group_choices(name)
    lines = [
        f"~{group}" if choice is None else f"{group}={choice if choice.startswith('[') else quoted(choice)}"
        for group, choice in words.choices.items()
        if choice is not None or taken[group] is not None
    ]
    return [*lines, *words.raw]


class _Defaults:
    """The values of the chosen groups' own YAML, without what a recipe changes; composed when they are asked for."""

    def __init__(self, name: str, chosen: Mapping[str, str | None], config_dir: Path | None) -> None:
        taken = group_choices(name)
        self._name, self._config_dir = name, config_dir
        self._lines = [
            f"{group}={quoted(choice)}"
            for group, choice in chosen.items()
            if choice and group in taken and group != "recipe"
        ]
        self._tree: dict[str, Any] | None = None

    def at(self, path: list[str]) -> tuple[bool, Any]:
        """Whether there is a value, and which."""
        if self._tree is None:
            self._tree = composed(self._name, self._lines, self._config_dir).tree
        value: Any = self._tree
        for part in path:
            if not isinstance(value, Mapping) or part not in value:
                return False, None
            value = value[part]
        return True, value


def _set_all(stage: Stage, settings: Sequence[tuple[str, str | None]], defaults: _Defaults) -> list[str]:
    """Sets keys in the stage's tree; returns what is wrong with those that can't be set."""
    problems = list[str]()
    # The name of a component first: it decides which keys there are.
    for key, text in sorted(settings, key=lambda one: not (one[0].count(".") == 1 and one[0].endswith(".name"))):
        try:
            if text is None:
                path = path_of(stage.schema, stage.tree, key)
                annotation_at(stage.schema, stage.tree, key)
                _set(stage.tree, path, *defaults.at(path))
            elif not text:
                problems.append(about_nothing(stage, key))
            else:
                path, value = _read(stage, key, text)
                _set(stage.tree, path, True, value)
        except UnknownKeyError:
            problems.append(about_key(stage, key, text))
        except ConfigError as error:
            problems += [f"`{key}`: {problem}" for problem in error.problems]
    return problems


def _read(stage: Stage, key: str, text: str) -> tuple[list[str], Any]:
    annotation = annotation_at(stage.schema, stage.tree, key)
    short = short_for(annotation)
    nothing = text.lower() == "null" and type(None) in members(annotation)
    if short is not None and not nothing and not text.startswith("{"):
        return _read(stage, f"{key}.{short}", text)
    value = read_value(text, annotation)
    # What can't be a text may still be looked up, as in seed=${oc.env:SLURM_ARRAY_TASK_ID}.
    looked_up = text.startswith("${") and str not in members(annotation)
    return path_of(stage.schema, stage.tree, key), value if looked_up else literal(value)


def _set(tree: dict[str, Any], path: list[str], there: bool, value: Any) -> None:
    for part in path[:-1]:
        inner = tree.get(part)
        tree[part] = inner if isinstance(inner, dict) else {}
        tree = tree[part]
    if not there:
        tree.pop(path[-1], None)
    elif isinstance(value, Mapping) and isinstance(tree.get(path[-1]), dict):
        for key, inner in value.items():
            _set(tree[path[-1]], [str(key)], True, inner)
    else:
        tree[path[-1]] = copy.deepcopy(value)


def _settle_rivals(schema: type[BaseModel], tree: dict[str, Any], given: Mapping[str, str | None]) -> None:
    """Of two keys for one thing, such as ``epochs`` and ``steps``: the one that was given, and a word where both were."""
    rivals: Mapping[str, str] = getattr(schema, "wins_over", {})
    for winner, loser in rivals.items():
        if given.get(loser) is None or tree.get(winner) is None:
            continue
        if winner not in given:  # a recipe's
            tree[winner] = None
        elif os.environ.get("RANK", "0") == "0":
            _log.warning(
                "`%s=%s` is taken, and `%s=%s` is not: give one of the two.", winner, given[winner], loser, given[loser]
            )


def _strangers(stage: Stage) -> list[str]:
    """Keys of YAML files that no schema knows; they are taken out of the tree, so that they are told once."""
    if stage.schema.model_config.get("extra") != "forbid":
        return []
    problems = list[str]()
    for key, value in flatten(stage.tree).items():
        try:
            annotation_at(stage.schema, stage.tree, key)
        except UnknownKeyError:
            problems.append(about_key(stage, key, None if value is None else str(value)))
            first = key.split(".")[0]
            known = first in stage.schema.model_fields
            _set(stage.tree, key.split(".") if known else [first], False, None)
    return problems
