"""Values as people type them, read by the type that their key has: a path or a text is taken literally."""

from __future__ import annotations

import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from ssl_pipeline.config.base import ConfigError

_PAIRS = {"[": "]", "{": "}", "(": ")"}


def quoted(text: str) -> str:
    """A text as one word of a list or a value, whatever is in it; :func:`read_value` reads it back."""
    escaped = re.sub(r'(\\*)("|\Z)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), text)
    return f'"{escaped}"'


def listed(texts: list[str] | tuple[str, ...]) -> str:
    """Texts as the value of a list, each quoted."""
    return f"[{','.join(map(quoted, texts))}]"


def unquoted(text: str) -> str | None:
    """What stands between quotes that enclose a text; None where no pair of quotes does."""
    quote = text[:1]
    if (
        len(text) < 2
        or quote not in ("'", '"')
        or not re.fullmatch(rf"{quote}(?:\\.|[^\\{quote}])*{quote}", text, re.DOTALL)
    ):
        return None
    # Backslashes mean themselves, but before a quote.
    return re.sub(rf"(\\+)({quote}|\Z)", lambda found: found[1][: len(found[1]) // 2] + found[2], text[1:-1])


def split_list(text: str) -> list[str]:
    """The elements of ``[a, 'b,c', [d, e]]``: separated by commas that stand in no quotes and no brackets.

    A bracket that is never closed is a letter like any other.
    """
    elements, start, place = list[str](), 0, 0
    inner = text[1:-1]
    while place < len(inner):
        if inner[place] in _PAIRS:
            place = _closing(inner, place)
        elif inner[place] in "'\"" and not inner[start:place].strip():
            place = _closing_quote(inner, place)
        elif inner[place] == ",":
            elements.append(inner[start:place].strip())
            start = place + 1
        place += 1
    last = inner[start:].strip()
    return [*elements, last] if last or elements else []


def _closing(text: str, start: int) -> int:
    """Where the bracket at ``start`` is closed; ``start`` itself where it never is."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == text[start]) - (text[place] == _PAIRS[text[start]])
        if depth == 0:
            return place
    return start


def _closing_quote(text: str, start: int) -> int:
    found = re.compile(rf"{text[start]}(?:\\.|[^\\{text[start]}])*{text[start]}", re.DOTALL).match(text, start)
    return found.end() - 1 if found else start


def members(annotation: Any) -> list[Any]:
    """The types that a value may have: those of a union, without what only annotates them."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in members(part)]
    return [annotation]


def read_value(text: str, annotation: Any) -> Any:
    """A value of the command line.

    Args:
        text: as it was typed. Quotes that enclose all of it are taken off.
        annotation: the key's type in the schema; None where it is not known.

    Raises:
        ConfigError: braces or brackets that can't be read.
    """
    kinds = [kind for kind in members(annotation) if kind is not None]
    if text.lower() == "null" and (type(None) in kinds or str not in kinds):
        return None
    inside = unquoted(text)
    if inside is not None:
        return inside
    sequence = next((kind for kind in kinds if get_origin(kind) in (list, tuple)), None)
    if sequence is not None and text.startswith("[") and text.endswith("]"):
        return _read_elements(split_list(text), get_args(sequence))
    if str in kinds and not {int, float, bool} & set(kinds):
        return text
    if any(get_origin(kind) is Literal and text in get_args(kind) for kind in kinds):
        return text
    if text.startswith(("{", "[")):
        return _read_tree(text)
    return _read_scalar(text, kinds)


def _read_elements(elements: list[str], of: tuple[Any, ...]) -> list[Any]:
    if len(of) == 2 and of[1] is Ellipsis:
        of = of[:1]
    kinds = [of[min(place, len(of) - 1)] for place in range(len(elements))]
    return [read_value(element, kind) for element, kind in zip(elements, kinds, strict=True)]


def _read_tree(text: str) -> Any:
    """``{key: value}`` or a list of no declared kind, by Hydra's grammar."""
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
        if not override.is_sweep_override():
            return override.value()
    except HydraException:
        pass
    raise ConfigError(
        f"{text!r} can't be read: write {{key: value, other: value}} or [one, two], with quotes around texts that hold other signs "
        "than letters and digits."
    )


def _read_scalar(text: str, kinds: list[Any]) -> Any:
    known: dict[str, Any] = {"true": True, "false": False} | ({"none": None} if type(None) in kinds else {})
    if str in kinds:  # a number only where one is meant: `7` is one, and `007` and `1e5` are names
        return int(text) if int in kinds and text.isdecimal() and str(int(text)) == text else text
    if text.lower() in known:
        return known[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text
