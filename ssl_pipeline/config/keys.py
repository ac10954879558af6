"""The keys of a schema by their dotted names, those of the chosen components included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard, get_args, get_origin

from pydantic import BaseModel

from ssl_pipeline.config.base import ConfigError, FrozenModel
from ssl_pipeline.config.resolve import config_class, rooms
from ssl_pipeline.config.words import members


class UnknownKeyError(LookupError):
    """A schema has no such key."""


def annotation_at(schema: type[BaseModel], tree: Mapping[str, Any], key: str) -> Any:
    """The type of a key; None where a component is chosen that there is not, so that nobody can know.

    Args:
        schema: the stage's.
        tree: its values, which say what components are chosen.
        key: with its dots.

    Raises:
        UnknownKeyError: there is no such key.
    """
    first, *rest = key.split(".")
    inner = _model_of(schema, tree, first)
    if inner is None:
        raise UnknownKeyError(first)
    if inner is _ANY:
        return None
    for place, part in enumerate(rest):
        models = [kind for kind in members(inner) if is_model(kind)]
        field = next((model.model_fields[part] for model in models if part in model.model_fields), None)
        if field is None:
            mapping = next((kind for kind in members(inner) if get_origin(kind) is dict), None)
            if mapping is None:
                raise UnknownKeyError(".".join(rest[place:]))
            return get_args(mapping)[1]  # its own keys are anybody's, dots included
        inner = field.annotation
    return inner


def path_of(schema: type[BaseModel], tree: Mapping[str, Any], key: str) -> list[str]:
    """A key's parts; the name within a mapping of the user's own names is one part, dots included."""
    parts = key.split(".")
    for length in range(1, len(parts)):
        inner = annotation_at(schema, tree, ".".join(parts[:length]))
        if any(get_origin(kind) is dict for kind in members(inner)):
            return [*parts[:length], ".".join(parts[length:])]
    return parts


_ANY = object()


def _model_of(schema: type[BaseModel], tree: Mapping[str, Any], name: str) -> Any:
    """The type of a field of the stage; of a component the ``Config`` of the one that is chosen."""
    if name not in schema.model_fields:
        return None
    room, value = rooms(schema).get(name), tree.get(name)
    if room is None:
        return schema.model_fields[name].annotation
    if not isinstance(value, Mapping):
        return _ANY if value is not None else schema.model_fields[name].annotation
    try:
        return config_class(room, name, str(value.get("name")))
    except ConfigError:
        return _ANY


def short_for(annotation: Any) -> str | None:
    """The key that a plain value is short for, where a type is a model that has such a key."""
    return next((kind.short_for for kind in members(annotation) if is_model(kind) and kind.short_for), None)


def all_keys(schema: type[BaseModel], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of what is chosen, groups included, with its type: those of fewest parts first."""
    found = dict[str, Any]()
    for name in schema.model_fields:
        inner = _model_of(schema, tree, name)
        if inner is _ANY:
            continue
        off = type(None) in members(inner) and tree.get(name) is None  # what is not taken has no keys to suggest
        found |= {name: inner} if off else dict(_below(name, inner))
    return dict(sorted(found.items(), key=lambda one: one[0].count(".")))


def _below(key: str, annotation: Any) -> Iterator[tuple[str, Any]]:
    yield key, annotation
    for kind in members(annotation):
        if is_model(kind) and not kind.one_value:
            for name, field in kind.model_fields.items():
                yield from _below(f"{key}.{name}", field.annotation)


def is_model(kind: Any) -> TypeGuard[type[FrozenModel]]:
    """Whether a type is a model with keys of its own."""
    return isinstance(kind, type) and issubclass(kind, FrozenModel)
