"""The pages that are generated from the code: the keys of every verb and group, and a page for each task and method."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from ssl_pipeline.cli import VERBS
from ssl_pipeline.config.base import ConfigError, FrozenModel
from ssl_pipeline.config.compose import choices, compose, config_root
from ssl_pipeline.config.schema import is_model, module_of, names, rooms
from ssl_pipeline.config.values import members
from ssl_pipeline.transforms.config import ViewChanges

ROOT = Path(__file__).parents[2]
TASKS = {"pretext": "pretrain", "downstream": "finetune", "domain": "finetune"}  # rooms with a page for each component
_MORE = {"domain": " 'domain.target=[sketch]' encoder=RUN"}  # what a command of the room needs beside its choice
# Titles of pages where the module's name is not how people write it.
_TITLES = {
    name.lower().replace(" ", "_").replace("-", "_"): name
    for name in ("Barlow Twins", "BYOL", "DCL", "DCLW", "DINO", "MoCo v2", "MoCo v3", "NNCLR", "SimCLR", "SimSiam", "SupCon", "SwAV", "VICReg",
                 "AdaBN", "CORAL", "CORAL over sources", "DANCE", "DANN", "ERM", "MCC", "MixStyle", "MMD", "SHOT-IM", "Source-only")
}  # fmt: skip
_TYPES = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}
_ONE_VALUE = {"DurationValue": "duration", "BadFilesLimit": "share or number"}
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_CALL = re.compile(r"run_command\(\s*\"(?P<config>\w+)\", (?P<schema>\w+),")


@dataclass(frozen=True)
class Verb:
    """A verb that reads a configuration: its name, its ``configs/<config>.yaml``, and the model that checks it."""

    name: str
    config: str
    schema: type[BaseModel]


@cache
def configured_verbs() -> list[Verb]:
    """All verbs that read a configuration; the others take options, which ``--help`` lists."""
    found = []
    for name, (module, _) in VERBS.items():
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        if call := _CALL.search(Path(spec.origin).read_text()):
            found.append(Verb(name, call["config"], getattr(importlib.import_module(module), call["schema"])))
    return found


@cache
def groups() -> dict[str, Verb]:
    """The groups of ``configs`` that a schema has a field for, and the first verb that has it."""
    found: dict[str, Verb] = {}
    for verb in configured_verbs():
        for name in verb.schema.model_fields:
            if (config_root() / name).is_dir():
                found.setdefault(name, verb)
    return found


@cache
def pages() -> dict[PurePosixPath, str]:
    """All generated pages by their place below ``docs``."""
    folder = PurePosixPath("reference/configuration")
    found = {folder / "index.md": _index()}
    found |= {folder / f"{_file(verb.name)}.md": _verb_page(verb) for verb in configured_verbs()}
    found |= {folder / f"{group}_group.md": _group_page(group, verb) for group, verb in groups().items()}
    return found | {
        PurePosixPath("reference", room, f"{name}.md"): _task(room, name) for room in TASKS for name in names(room)
    }


# Keys


def keys(schema: type[BaseModel], tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """The keys of a model and of the models in it: name, type, default and meaning.

    Args:
        schema: the model.
        tree: what YAML says; what it leaves out has the schema's default.
        prefix: of the names, with its dot.
    """
    properties = schema.model_json_schema()["properties"]
    for name, field in schema.model_fields.items():
        given = tree.get(name, "required" if field.is_required() else field.get_default(call_default_factory=True))
        given = given.model_dump(mode="json", serialize_as_any=True) if isinstance(given, BaseModel) else given
        # A group of changes to a view has the defaults of the view, so that its keys have none of their own.
        inner = None if issubclass(schema, ViewChanges) else model_of(field.annotation)
        default = "" if inner and isinstance(given, Mapping) else _yaml(given)
        yield prefix + name, _type(properties[name]), default, meaning(schema, name)
        if inner:
            yield from keys(inner, given if isinstance(given, Mapping) else {}, f"{prefix}{name}.")


def meaning(schema: type[BaseModel], key: str) -> str:
    """The description of a key's field, or its line in the section ``Attributes``: the model's own, or that of the nearest base."""
    for base in schema.__mro__:
        field = base.model_fields.get(key) if issubclass(base, BaseModel) and base is not BaseModel else None
        if field is not None and field.description:
            return _inline(field.description)
        section = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")[2]
        if found := re.search(rf"^    {key}: (.*(?:\n {{5,}}.*)*)", section, re.MULTILINE):
            return _inline(" ".join(found[1].split()))
    return ""


def model_of(annotation: Any) -> type[FrozenModel] | None:
    """The model in an annotation, if its keys can be set one by one."""
    return next((kind for kind in members(annotation) if is_model(kind) and not kind.one_value), None)


def table(rows: Iterator[tuple[str, str, str, str]]) -> str:
    """Keys as Markdown; a key of a group has its full name, so that it can be copied."""
    lines = [f"| `{name}` | {kind} | {default} | {said} |" for name, kind, default, said in rows]
    return "\n".join(["| key | type | default | meaning |\n| --- | --- | --- | --- |", *lines])


def _type(schema: Any) -> str:
    """A JSON schema in words."""
    if not isinstance(schema, dict):  # `True` allows anything
        return "anything"
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        single = any(kind.__name__ == name and kind.one_value for kind in _subclasses(FrozenModel))
        return _ONE_VALUE.get(name, name) if single else "group of keys"
    if "prefixItems" in schema:
        return f"{len(schema['prefixItems'])} values: {_type(schema['prefixItems'][0])}"
    if "items" in schema:
        return f"list: {_type(schema['items'])}"
    if schema.get("type") == "object":
        return f"by name: {_type(schema.get('additionalProperties') or {})}"
    bounds = ", ".join(f"{sign} {schema[name]:g}" for name, sign in _BOUNDS.items() if name in schema)
    return f"{_TYPES.get(schema.get('type', ''), 'anything')} {bounds}".strip()


def _subclasses(kind: type[FrozenModel]) -> Iterator[type[FrozenModel]]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


def _yaml(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if text in ("", "required") else f"`{text.replace('|', '∣')}`"


# Pages


def _index() -> str:
    return "\n".join([
        "# Configuration reference", "",
        "Generated from the schema that checks every run. `group=choice` takes another part, `key=value` changes a key, on the "
        "command line or in YAML; `--cfg job` prints the whole configuration that would run, `--config-dir` adds your own YAML. "
        "A *duration* is a number and its unit: `10 epochs`, `500 steps`, `5%` of the run.", "",
        "| verb | what it does |", "| --- | --- |",
        *(f"| [`{verb.name}`]({_file(verb.name)}.md) | {VERBS[verb.name][1]} |" for verb in configured_verbs()), "",
        "| group | choices |", "| --- | --- |",
        *(f"| [`{group}`]({group}_group.md) | {', '.join(f'`{choice}`' for choice in choices(group))} |" for group in groups()),
        "", "The group `recipe` holds whole experiments, which override all of these: [recipes](../../recipes.md).", "",
    ])  # fmt: skip


def _verb_page(verb: Verb) -> str:
    chosen = [name for name in verb.schema.model_fields if name in groups()]
    rows = (row for row in keys(verb.schema, compose(verb.config)) if row[0].split(".")[0] not in chosen)
    linked = [f"| [`{name}`]({name}_group.md) | {meaning(verb.schema, name)} |" for name in chosen]
    parts = [f"# ssl-pipeline {verb.name}", _sentence(f"{VERBS[verb.name][1]}."), "## Keys", table(rows)]
    parts += ["## Groups", "\n".join(["| group | what it chooses |\n| --- | --- |", *linked])] if linked else []
    return "\n\n".join([*parts, "## Defaults", _file_block(f"{verb.config}.yaml"), ""])


def _group_page(group: str, verb: Verb) -> str:
    room, parts = rooms(verb.schema).get(group), [f"# The group {group}", _sentence(meaning(verb.schema, group))]
    if room:
        for name in names(room):
            said = prose(module_of(room, name).__doc__).split("\n\n")[0]
            parts += [f"## {group}={name}", said, component_table(group, room, name)]
        return "\n\n".join([*parts, ""])
    schema, tree, first = (
        model_of(verb.schema.model_fields[group].annotation),
        compose(verb.config).get(group),
        choices(group)[0],
    )
    assert schema is not None
    source = f"`{verb.name}`" if tree is not None else f"`{group}={first}`; `{verb.name}` has none by itself"
    tree = tree if tree is not None else compose(verb.config, [f"{group}={first}"])[group]
    parts += [f"Defaults are those of {source}.", table(keys(schema, tree, f"{group}."))]
    parts += [f"## {group}={choice}\n\n{_file_block(f'{group}/{choice}.yaml')}" for choice in choices(group)]
    return "\n\n".join([*parts, ""])


def component_table(group: str, room: str, name: str) -> str:
    """The keys of a component with the defaults of its YAML."""
    try:
        tree = compose(groups()[group].config, [f"{group}={name}"])[group]
    except ConfigError:  # a component without a YAML of its name
        tree = {"name": name}
    return table(keys(module_of(room, name).Config, tree, f"{group}."))


def recipes_of(room: str, name: str) -> list[str]:
    """The recipes that choose a task."""
    line = re.compile(rf"^  - override /{room}: {name}$", re.MULTILINE)
    return [
        recipe for recipe in choices("recipe") if line.search((config_root() / f"recipe/{recipe}.yaml").read_text())
    ]


def _task(room: str, name: str) -> str:
    module: ModuleType = module_of(room, name)
    recipes = ", ".join(f"`{recipe}`" for recipe in recipes_of(room, name))
    return "\n\n".join([
        f"# {_TITLES.get(name, name.replace('_', ' ').capitalize())}", prose(module.__doc__),
        f"```bash\nssl-pipeline {TASKS[room]} {room}={name}{_MORE.get(room, '')}\n```",
        *([f"Recipes with published settings ([all](../../recipes.md)): {recipes}."] if recipes else []),
        "## Keys", prose(module.Config.__doc__), component_table(room, room, name), f"Source: `{module.__name__.replace('.', '/')}.py`.", "",
    ])  # fmt: skip


# Docstrings as Markdown


def prose(text: str | None) -> str:
    """A docstring without its sections: paragraphs, and equations as blocks."""
    body = re.split(r"^(?:Attributes|Args|Returns|Raises):$", inspect.cleandoc(text or ""), flags=re.MULTILINE)[0]
    return "\n\n".join(map(_block, re.split(r"\n\s*\n", body.strip())))


def _block(paragraph: str) -> str:
    equation = re.match(r"\.\. math:: *\n?", paragraph)
    inner = paragraph[equation.end() :] if equation else paragraph
    if equation or all(line.startswith("    ") for line in paragraph.splitlines()):
        return f"```text\n{textwrap.dedent(inner)}\n```"
    return _inline(paragraph)


def _inline(text: str) -> str:
    return re.sub(r":\w+:`~?([^`]+)`", lambda role: f"`{role[1].rpartition('.')[2]}`", text).replace("``", "`")


def _file_block(path: str) -> str:
    return f"```yaml\n{(config_root() / path).read_text()}```"


def _file(verb: str) -> str:
    return re.sub("[ -]", "_", verb)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
