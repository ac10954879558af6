"""The configuration reference, generated from the schema: each key's type, bounds, default and meaning."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs.site.docstrings import attributes, prose
from docs.site.verbs import Verb, configured_verbs
from ssl_pipeline.cli import VERBS
from ssl_pipeline.config.base import ComponentOf, ConfigError
from ssl_pipeline.config.compose import choices, compose, config_root
from ssl_pipeline.config.schema import module_of, names
from ssl_pipeline.data.bad_files import BadFilesLimit
from ssl_pipeline.schedules import DurationValue
from ssl_pipeline.transforms.policy import ViewChanges

# Models that are one value in YAML.
ONE_VALUE: dict[type, str] = {DurationValue: "duration", BadFilesLimit: "share or number"}
_PLAIN = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "null", Any: "anything"}
_BOUNDS = (
    (annotated_types.Ge, "ge", "≥"), (annotated_types.Gt, "gt", ">"), (annotated_types.Le, "le", "≤"),
    (annotated_types.Lt, "lt", "<"),
)  # fmt: skip


@dataclass(frozen=True)
class Key:
    """A row of the reference.

    Attributes:
        name: as in an override, with its dots.
        kind: type and bounds.
        default: what holds when it is not given, as YAML.
        meaning: what its model says of it.
    """

    name: str
    kind: str
    default: str
    meaning: str


def keys(schema: type[BaseModel], tree: Mapping[str, Any], prefix: str = "") -> Iterator[Key]:
    """The keys of a model, those of the models within it included.

    Args:
        schema: the model.
        tree: what YAML says; what it leaves out has the schema's default.
        prefix: of the names, with its dot.
    """
    said = attributes(schema)
    for name, field in schema.model_fields.items():
        inner = model_of(field.annotation)
        given = tree.get(name, _default(field))
        default = (
            "" if inner and isinstance(given, Mapping) and not issubclass(schema, ViewChanges) else _as_yaml(given)
        )
        yield Key(f"{prefix}{name}", _kind(field), default, said.get(name, ""))
        if inner and not issubclass(schema, ViewChanges):  # what such a group leaves out is the base policy's
            yield from keys(inner, given if isinstance(given, Mapping) else {}, f"{prefix}{name}.")


def table(rows: Iterator[Key]) -> str:
    """Rows as Markdown; a key of a group is named in full, so that it can be copied."""
    head = "| key | type | default | meaning |\n| --- | --- | --- | --- |"
    lines = [f"| `{key.name}` | {key.kind} | {_code(key.default)} | {key.meaning} |" for key in rows]
    return "\n".join([head, *lines])


@cache
def pages() -> dict[PurePosixPath, str]:
    """All pages of the reference by their place below ``docs``."""
    folder, verbs = PurePosixPath("reference/configuration"), configured_verbs()
    found = {folder / verb.page: _verb_page(verb) for verb in verbs}
    for group, (verb, field) in groups().items():
        room = room_of(field)
        text = _room_page(verb, group, room) if room else _group_page(verb, group, field)
        found[folder / f"{group}_group.md"] = text
    found[folder / "index.md"] = _index(verbs)
    return found


@cache
def groups() -> dict[str, tuple[Verb, FieldInfo]]:
    """The groups of ``configs`` that a schema has a field for, and the first verb that has it."""
    found: dict[str, tuple[Verb, FieldInfo]] = {}
    for verb in configured_verbs():
        for name, field in verb.schema.model_fields.items():
            if (config_root() / name).is_dir():
                found.setdefault(name, (verb, field))
    return found


def room_of(field: FieldInfo) -> str | None:
    """The room whose modules are a group's components."""
    return next((mark.package for mark in field.metadata if isinstance(mark, ComponentOf)), None)


def component_table(group: str, room: str, name: str) -> str:
    """The keys of a component with the defaults of its YAML."""
    return table(keys(module_of(room, name).Config, _composed(groups()[group][0].config, group, name), f"{group}."))


def _composed(config: str, group: str, choice: str) -> Mapping[str, Any]:
    try:
        tree: Mapping[str, Any] = compose(config, [f"{group}={choice}"])[group]
    except ConfigError:  # a component without a YAML of its name
        return {"name": choice}
    return tree


def _index(verbs: list[Verb]) -> str:
    lines = [
        "# Configuration reference", "",
        "Generated from the schema that checks every run. `group=choice` takes another part, `key=value` changes a key, on the "
        "command line or in YAML; `--cfg job` prints the whole configuration that would run, `--config-dir` adds your own YAML. "
        "A *duration* is a number and its unit: `10 epochs`, `500 steps`, `5%` of the run.", "",
        "| verb | what it does |", "| --- | --- |",
        *(f"| [`{verb.name}`]({verb.page}) | {VERBS[verb.name][1]} |" for verb in verbs), "",
        "| group | choices |", "| --- | --- |",
        *(f"| [`{group}`]({group}_group.md) | {', '.join(f'`{choice}`' for choice in choices(group))} |" for group in groups()),
        "", "The group `recipe` holds whole experiments, which override all of these: [recipes](../../recipes.md).", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _verb_page(verb: Verb) -> str:
    tree, said = compose(verb.config), attributes(verb.schema)
    own = {name: field for name, field in verb.schema.model_fields.items() if name not in groups()}
    rows = (key for key in keys(verb.schema, tree) if key.name.split(".")[0] in own)
    linked = [
        f"| [`{name}`]({name}_group.md) | {said.get(name, '')} |"
        for name in verb.schema.model_fields
        if name in groups()
    ]
    parts = [f"# ssl-pipeline {verb.name}", _sentence(f"{VERBS[verb.name][1]}.")]
    parts += ["## Keys", table(rows)]
    if linked:
        parts += ["## Groups", "\n".join(["| group | what it chooses |", "| --- | --- |", *linked])]
    source = (config_root() / f"{verb.config}.yaml").read_text()
    return "\n\n".join([*parts, "## Defaults", f"```yaml\n{source}```", ""])


def _room_page(verb: Verb, group: str, room: str) -> str:
    parts = [f"# The group {group}", _sentence(attributes(verb.schema).get(group, ""))]
    for name in names(room):
        module = module_of(room, name)
        parts += [f"## {group}={name}", prose(module.__doc__).split("\n\n")[0], component_table(group, room, name)]
    return "\n\n".join([*parts, ""])


def _group_page(verb: Verb, group: str, field: FieldInfo) -> str:
    schema = model_of(field.annotation)
    assert schema is not None
    tree, first = compose(verb.config).get(group), choices(group)[0]
    defaults = f"`{verb.name}`" if tree is not None else f"`{group}={first}`; `{verb.name}` has none by itself"
    tree = tree if tree is not None else compose(verb.config, [f"{group}={first}"])[group]
    parts = [f"# The group {group}", _sentence(attributes(verb.schema).get(group, "")) or prose(schema.__doc__)]
    parts += [f"Defaults are those of {defaults}.", table(keys(schema, tree, f"{group}."))]
    for choice in choices(group):
        parts += [f"## {group}={choice}", f"```yaml\n{(config_root() / group / f'{choice}.yaml').read_text()}```"]
    return "\n\n".join([*parts, ""])


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The model within an annotation, if its keys can be set one by one."""
    for part in (annotation, *_members(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel) and part not in ONE_VALUE:
            return part
    return None


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()


def _default(field: FieldInfo) -> Any:
    if field.is_required():
        return ...
    value = field.get_default(call_default_factory=True)
    return value.model_dump(mode="json", serialize_as_any=True) if isinstance(value, BaseModel) else value


def _kind(field: FieldInfo) -> str:
    return _name_of(field.annotation) + _bounds(field.metadata)


def _name_of(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _name_of(inner[0]) + _bounds(inner[1:])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if _members(annotation):
        return " or ".join(_name_of(part) for part in inner)
    if origin is tuple and inner[-1] is not ...:
        return f"{len(inner)} values: {_name_of(inner[0])}"
    if origin in (tuple, list):
        return f"list: {_name_of(inner[0])}"
    if origin is dict:
        return f"by name: {_name_of(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return ONE_VALUE.get(annotation, "group of keys")
    return _PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds(metadata: Any) -> str:
    marks = list(metadata)
    for mark in metadata:
        marks += getattr(mark, "metadata", [])  # Annotated[float, Field(ge=0)] keeps its bounds within
    said = [
        f"{sign} {getattr(mark, name):g}" for mark in marks for kind, name, sign in _BOUNDS if isinstance(mark, kind)
    ]
    return f", {', '.join(said)}" if said else ""


def _as_yaml(value: Any) -> str:
    if value is ...:
        return "required"
    if isinstance(value, str):
        return value
    plain = list(value) if isinstance(value, tuple) else value
    return json.dumps(plain, ensure_ascii=False, default=str)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _code(text: str) -> str:
    return text if text in ("", "required") else f"`{text.replace('|', '∣')}`"
