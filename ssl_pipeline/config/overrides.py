"""What a command line changes in a composed configuration: choices of groups first, then keys, each read by its type."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ssl_pipeline.config.base import ConfigError, flatten
from ssl_pipeline.config.compose import composed, group_choices, groups, literal, resolved
from ssl_pipeline.config.schema import UnknownKeyError, find_key, is_model
from ssl_pipeline.config.suggest import Stage, about_choice, about_key, about_nothing, about_word
from ssl_pipeline.config.values import members, quoted, read_value

_log = logging.getLogger("ssl_pipeline")
_NOTHING = object()


@dataclass(frozen=True)
class Words:
    """The words of a command line by kind."""

    choices: dict[str, str | None] = field(default_factory=dict)  # of groups, by their names; None for nothing
    raw: list[str] = field(default_factory=list)  # Hydra's grammar: `+group=choice` for a group of the user's own
    settings: list[tuple[str, str | None]] = field(default_factory=list)  # keys and values as typed; None for `~key`
    others: list[str] = field(default_factory=list)


def overridden(
    name: str, schema: type[BaseModel], overrides: Sequence[str], config_dir: Path | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The plain values of a stage: ``configs/<name>.yaml``, the chosen groups, and the keys that were set.

    Returns:
        The values, and a sentence for each mistake in them.

    Raises:
        ConfigError: the configuration can't be composed.
    """
    words = _sort(name, overrides, config_dir)
    stage = Stage(name, schema, {}, config_dir)
    wrong = [text for group, choice in words.choices.items() if (text := about_choice(stage, group, choice))]
    if wrong:
        raise ConfigError([*wrong, *(about_word(stage, word) for word in words.others)])
    found, taken = composed(name, _selections(name, words), config_dir)
    tree = {key: value for key, value in found.items() if key not in words.choices or words.choices[key] is not None}
    stage, ours = replace(stage, tree=tree), group_choices(name).keys() - {"recipe"}
    chosen = [f"{group}={quoted(choice)}" for group, choice in taken.items() if choice and group in ours]
    # Composed only when a `~key` asks for it: the chosen groups' own YAML, without what a recipe changes.
    defaults = cache(lambda: composed(name, chosen, config_dir)[0])
    problems = [about_word(stage, word) for word in words.others]
    problems += _set_all(stage, words.settings, defaults)
    _settle_rivals(schema, tree, dict(words.settings))
    problems += _unknown_in_files(stage)
    return resolved(tree), problems


def _sort(name: str, overrides: Sequence[str], config_dir: Path | None) -> Words:
    words, ours, known = Words(), group_choices(name), groups(config_dir)
    for override in overrides:
        key, equals, text = override.partition("=")
        bare, removed = key.strip().lstrip("+~"), key.startswith("~")
        if not bare or not (equals or removed):
            words.others.append(override)
        elif "@" in bare or (bare not in ours and key.startswith("+") and bare.split("/")[0] in known):
            words.raw.append(override)
        elif bare in ours:
            words.choices[bare] = None if removed or text.lower() == "null" else text.removesuffix(".yaml")
        else:
            words.settings.append((bare, None if removed else text))
    return words


def _selections(name: str, words: Words) -> list[str]:
    """Choices in Hydra's grammar, which refuses to take off a group of which nothing is taken."""
    ours = group_choices(name)
    lines = [
        f"~{group}" if choice is None else f"{group}={choice if choice.startswith('[') else quoted(choice)}"
        for group, choice in words.choices.items()
        if choice is not None or ours[group] is not None
    ]
    return [*lines, *words.raw]


def _set_all(
    stage: Stage, settings: Sequence[tuple[str, str | None]], defaults: Callable[[], dict[str, Any]]
) -> list[str]:
    """Sets keys in the stage's tree; returns a sentence for each that can't be set."""
    problems = list[str]()
    # The name of a component first: it decides which keys there are.
    for key, text in sorted(settings, key=lambda one: not (one[0].count(".") == 1 and one[0].endswith(".name"))):
        try:
            if text is None:
                path, _ = find_key(stage.schema, stage.tree, key)
                _set(stage.tree, path, _value_at(defaults(), path))
            elif not text:
                problems.append(about_nothing(stage, key))
            else:
                _set(stage.tree, *_read(stage, key, text))
        except UnknownKeyError:
            problems.append(about_key(stage, key, text))
        except ConfigError as error:
            problems += [f"`{key}`: {problem}" for problem in error.problems]
    return problems


def _read(stage: Stage, key: str, text: str) -> tuple[list[str], Any]:
    path, annotation = find_key(stage.schema, stage.tree, key)
    kinds = members(annotation)
    short = next((kind.short_for for kind in kinds if is_model(kind) and kind.short_for), None)
    null = text.lower() == "null" and type(None) in kinds
    if short is not None and not null and not text.startswith("{"):
        return _read(stage, f"{key}.{short}", text)
    value = read_value(text, annotation)
    # What can't be a text may still be looked up, as in seed=${oc.env:SLURM_ARRAY_TASK_ID}.
    looked_up = text.startswith("${") and str not in kinds
    return path, value if looked_up else literal(value)


def _value_at(tree: Mapping[str, Any], path: list[str]) -> Any:
    value: Any = tree
    for part in path:
        if not isinstance(value, Mapping) or part not in value:
            return _NOTHING
        value = value[part]
    return value


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        inner = tree.get(part)
        tree[part] = inner if isinstance(inner, dict) else {}
        tree = tree[part]
    if value is _NOTHING:
        tree.pop(path[-1], None)
    elif isinstance(value, Mapping) and isinstance(tree.get(path[-1]), dict):
        for key, inner in value.items():
            _set(tree[path[-1]], [str(key)], inner)
    else:
        tree[path[-1]] = copy.deepcopy(value)


def _settle_rivals(schema: type[BaseModel], tree: dict[str, Any], given: Mapping[str, str | None]) -> None:
    """Of two keys for one thing, such as ``epochs`` and ``steps``, takes the one that was given; warns where both were."""
    rivals: Mapping[str, str] = getattr(schema, "wins_over", {})
    for winner, loser in rivals.items():
        if given.get(loser) is None or tree.get(winner) is None:
            continue
        if winner not in given:  # it is a recipe's
            tree[winner] = None
        elif os.environ.get("RANK", "0") == "0":
            _log.warning(
                "`%s=%s` is taken, and `%s=%s` is not: give one of the two.", winner, given[winner], loser, given[loser]
            )


def _unknown_in_files(stage: Stage) -> list[str]:
    """A sentence for each key of a YAML file that no schema has; it is taken out of the tree, so as not to be reported again."""
    if stage.schema.model_config.get("extra") != "forbid":
        return []
    problems = list[str]()
    for key, value in flatten(stage.tree).items():
        try:
            find_key(stage.schema, stage.tree, key)
        except UnknownKeyError:
            problems.append(about_key(stage, key, None if value is None else str(value)))
            first = key.split(".")[0]
            _set(stage.tree, key.split(".") if first in stage.schema.model_fields else [first], _NOTHING)
    return problems
