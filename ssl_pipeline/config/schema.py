"""The schema of a stage: its keys and their types, and validation that reports all mistakes at once."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import shlex
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, TypeGuard, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ssl_pipeline.config.base import ComponentConfig, ComponentOf, ConfigError, FrozenModel, closest
from ssl_pipeline.config.synonyms import renamed
from ssl_pipeline.config.values import members

Stage = TypeVar("Stage", bound=BaseModel)
_UNKNOWN = object()


class UnknownKeyError(LookupError):
    """A schema has no such key."""


# Components


def rooms(schema: type[BaseModel]) -> dict[str, str]:
    """The fields of a stage's schema whose model is chosen by ``name``, and the room of each."""
    marks = [(name, mark) for name, field in schema.model_fields.items() for mark in field.metadata]
    return {name: mark.package for name, mark in marks if isinstance(mark, ComponentOf)}


def names(room: str) -> list[str]:
    """The components of a room: modules that define a ``Config``, those of packages in it too."""
    found = _modules(f"ssl_pipeline.{room}")
    return [name for name, path in found.items() if hasattr(importlib.import_module(path), "Config")]


def module_of(room: str, name: str) -> ModuleType:
    """The module of a component in :func:`names`."""
    return importlib.import_module(_modules(f"ssl_pipeline.{room}")[name])


def _modules(package: str) -> dict[str, str]:
    found = dict[str, str]()
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        name = info.name.rpartition(".")[2]
        if info.ispkg:
            found |= _modules(info.name)
        elif not name.startswith("_"):
            found[name] = info.name
    return found


def config_class(room: str, field: str, name: str) -> type[ComponentConfig]:
    """The model of a component, ``name`` being a module of the room or a dotted name; ``field`` is its key, for messages.

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


# Keys


def is_model(kind: Any) -> TypeGuard[type[FrozenModel]]:
    """Whether a type is a model with keys of its own."""
    return isinstance(kind, type) and issubclass(kind, FrozenModel)


def find_key(schema: type[BaseModel], tree: Mapping[str, Any], key: str) -> tuple[list[str], Any]:
    """The parts of a dotted key and its type, by the components that ``tree`` chooses; below one that does not exist None.

    Raises:
        UnknownKeyError: there is no such key.
    """
    path = key.split(".")
    if path[0] not in schema.model_fields:
        raise UnknownKeyError(key)
    inner = _type_of(schema, tree, path[0])
    for at, part in enumerate(path[1:] if inner is not _UNKNOWN else (), start=1):
        kinds = members(inner)
        field = next((kind.model_fields[part] for kind in kinds if is_model(kind) and part in kind.model_fields), None)
        if field is None:
            mapping = next((kind for kind in kinds if get_origin(kind) is dict), None)
            if mapping is None:
                raise UnknownKeyError(key)
            return [*path[:at], ".".join(path[at:])], get_args(mapping)[1]  # its keys are the user's, and may hold dots
        inner = field.annotation
    return path, None if inner is _UNKNOWN else inner


def all_keys(schema: type[BaseModel], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of what is chosen, groups included, with its type; those with the fewest parts first."""
    found = dict[str, Any]()
    for name in schema.model_fields:
        inner = _type_of(schema, tree, name)
        if inner is not _UNKNOWN:
            off = type(None) in members(inner) and tree.get(name) is None
            found |= {name: inner} if off else dict(_keys_below(name, inner))
    return dict(sorted(found.items(), key=lambda item: item[0].count(".")))


def _type_of(schema: type[BaseModel], tree: Mapping[str, Any], name: str) -> Any:
    """The type of a field of the stage; for a component that of the chosen one's ``Config``."""
    room, value = rooms(schema).get(name), tree.get(name)
    if room is None or value is None:
        return schema.model_fields[name].annotation
    if not isinstance(value, Mapping):
        return _UNKNOWN
    try:
        return config_class(room, name, str(value.get("name")))
    except ConfigError:
        return _UNKNOWN


def _keys_below(key: str, annotation: Any) -> Iterator[tuple[str, Any]]:
    yield key, annotation
    for kind in members(annotation):
        if is_model(kind) and not kind.one_value:
            for name, field in kind.model_fields.items():
                yield from _keys_below(f"{key}.{name}", field.annotation)


# Validation


def resolve(schema: type[Stage], tree: Mapping[str, Any]) -> Stage:
    """Validates a stage's plain values; a field annotated with :class:`ComponentOf` by ``<room>.<name>.Config``.

    Raises:
        ConfigError: lists every mistake.
    """
    values, problems, reported = dict(tree), list[str](), set[str]()
    for field, room in rooms(schema).items():
        if isinstance(values.get(field), Mapping):
            try:
                values[field] = component(room, field, values[field])
            except ConfigError as error:
                problems += error.problems
                reported.add(field)
                values.pop(field)
    try:
        config = schema.model_validate(values)
    except ValidationError as error:
        problems += [text for text in _sentences(error, schema) if text.split("`")[1] not in reported]
        config = None
    if problems or config is None:
        raise ConfigError(problems)
    return config


def component(room: str, field: str, tree: Mapping[str, Any]) -> ComponentConfig:
    """The typed configuration of one component by its plain values, ``name`` among them; ``field`` is its key, for messages.

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


def _nearest(word: str, known: list[str]) -> str:
    close = closest(word, known)
    return f" Did you mean `{close}`?" if close else f" Known: {', '.join(sorted(known))}."


def _sentences(error: ValidationError, schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Pydantic's findings as sentences that name the keys as the user writes them."""
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
    """What the value should have been, and the line to type where there is one."""
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
        kinds = members(field.annotation) if field else []
        schema = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), schema)
    return schema
