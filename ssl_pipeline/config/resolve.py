"""From a tree of plain values to one typed, frozen object, or to all mistakes in it at once."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import shlex
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ssl_pipeline.config.base import ComponentConfig, ComponentOf, ConfigError
from ssl_pipeline.config.synonyms import renamed

Stage = TypeVar("Stage", bound=BaseModel)


def resolve(schema: type[Stage], tree: Mapping[str, Any]) -> Stage:
    """Validates a composed configuration; components are found by the name they carry.

    Args:
        schema: the stage's model. A field annotated with :class:`ComponentOf` is validated by ``<room>.<name>.Config``.
        tree: plain values, as composed from YAML and overrides.

    Returns:
        The frozen configuration.

    Raises:
        ConfigError: listing every mistake in words.
    """
    values, problems = dict(tree), list[str]()
    for field, room in rooms(schema).items():
        if isinstance(values.get(field), Mapping):
            try:
                values[field] = component(room, field, values[field])
            except ConfigError as error:
                problems += error.problems
                values.pop(field)  # reported already: the stage's own check below must not repeat it
    try:
        return_value = schema.model_validate(values)
    except ValidationError as error:
        reported = {field for field in rooms(schema) if field in tree and field not in values}
        problems += [text for text in _sentences(error, schema) if text.split("`")[1] not in reported]
        return_value = None
    if problems or return_value is None:
        raise ConfigError(problems)
    return return_value


def component(room: str, field: str, tree: Mapping[str, Any]) -> ComponentConfig:
    """The typed configuration of one component.

    Args:
        room: the package it lives in, relative to ``ssl_pipeline``.
        field: the key it has in the stage's configuration, for messages.
        tree: its plain values, ``name`` among them.

    Raises:
        ConfigError: the name or a key is wrong.
    """
    name = tree.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"`{field}.name` is required: the name of one of {', '.join(names(room))}.")
    schema = config_class(room, field, name)
    try:
        return schema.model_validate(dict(tree))
    except ValidationError as error:
        raise ConfigError(_sentences(error, schema, field)) from None


def names(room: str) -> list[str]:
    """The components of a room: its modules that define a ``Config``, those of packages in it too."""
    found = _modules(f"ssl_pipeline.{room}")
    return [name for name, path in found.items() if hasattr(importlib.import_module(path), "Config")]


def module_of(room: str, name: str) -> ModuleType:
    """The module of a component that :func:`names` tells."""
    return importlib.import_module(_modules(f"ssl_pipeline.{room}")[name])


def _modules(package: str) -> dict[str, str]:
    """A package's modules and those of packages in it: name to path."""
    found = dict[str, str]()
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        name = info.name.rpartition(".")[2]
        if info.ispkg:
            found |= _modules(info.name)
        elif not name.startswith("_"):
            found[name] = info.name
    return found


def config_class(room: str, field: str, name: str) -> type[ComponentConfig]:
    """The model of a component's configuration.

    Args:
        room: the package it lives in, relative to ``ssl_pipeline``.
        field: the key it has in the stage's configuration, for messages.
        name: a module of the room, or a dotted name of the user's own.

    Raises:
        ConfigError: no such module can be imported, or it has no ``Config``.
    """
    path = name if "." in name else _modules(f"ssl_pipeline.{room}").get(name, f"ssl_pipeline.{room}.{name}")
    try:
        found = importlib.util.find_spec(path) is not None
    except (ModuleNotFoundError, ValueError):
        found = False
    if not found:
        hint = f"no module `{path}` can be imported" if "." in name else f"there is no {name!r} in {room}"
        raise ConfigError(f"`{field}.name`: {hint}.{_nearest(name, names(room))}")
    schema = getattr(importlib.import_module(path), "Config", None)
    if not (isinstance(schema, type) and issubclass(schema, ComponentConfig)):
        raise ConfigError(
            f"`{field}.name`: module `{path}` has no class `Config` derived from ComponentConfig.{_nearest('', names(room))}"
        )
    return schema


def rooms(schema: type[BaseModel]) -> dict[str, str]:
    """The fields of a stage's schema whose model is chosen by ``name``, and the room of each."""
    return {
        name: mark.package
        for name, field in schema.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, ComponentOf)
    }


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean `{close[0]}`?" if close else f" Known: {', '.join(sorted(known))}."


def _sentences(error: ValidationError, schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Pydantic's findings as sentences that name the key the way the user writes it."""
    sentences = []
    for finding in error.errors(include_url=False):
        loc = [str(part) for part in finding["loc"] if not str(part).startswith("function-")]
        key = ".".join([prefix, *loc] if prefix else loc) or "config"
        if finding["type"] == "extra_forbidden":
            known = list(_model_at(schema, loc[:-1]).model_fields)
            sentences.append(renamed(key, "…") or f"`{key}` is not a key.{_nearest(loc[-1], known)}")
        elif finding["type"] == "missing":
            sentences.append(f"`{key}` is required and was not given.")
        elif finding["type"] == "value_error":
            sentences.append(f"`{key}`: {finding['msg'].removeprefix('Value error, ')}")
        else:
            sentences.append(f"`{key}`: {_expected(finding, schema, key, loc)}")
    return list(dict.fromkeys(sentences))


def _expected(finding: ErrorDetails, schema: type[BaseModel], key: str, loc: list[str]) -> str:
    """What a value should have been, and the line to type where there is one."""
    value = finding["input"]
    shown = "null" if value is None else repr(value)
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    if finding["type"] in ("model_type", "dict_type") and (fields := list(_model_at(schema, loc).model_fields)):
        example = f": write `{key}.{fields[0]}={value}`" if plain else ""
        return f"it has keys of its own ({', '.join(fields)}), got {shown}{example}."
    if finding["type"] in ("tuple_type", "list_type"):
        line = f"{key}=[{value}]"
        return f"a list is needed, got {shown}{f': write `{shlex.quote(line)}`' if plain else ''}."
    if finding["type"] == "string_type" and plain:
        return f"a text is needed, and YAML reads {shown} as a number: put it in quotes there."
    return f"{finding['msg'][:1].lower()}{finding['msg'][1:]}, got {shown}."


def _model_at(schema: type[BaseModel], loc: list[str]) -> type[BaseModel]:
    for part in loc:
        field = schema.model_fields.get(part)
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        schema = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), schema)
    return schema
