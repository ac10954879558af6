"""Values of the command line, read by the type of their key: paths and texts are taken literally."""

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


def _in_quotes(quote: str) -> str:
    return rf"{quote}(?:\\.|[^\\{quote}])*{quote}"


def _unquoted(text: str) -> str | None:
    """The text between the quotes that enclose all of it; None where no pair of quotes does."""
    quote = text[:1]
    if quote not in ("'", '"') or not re.fullmatch(_in_quotes(quote), text, re.DOTALL):
        return None
    # Backslashes are literal, except before a quote.
    return re.sub(rf"(\\+)({quote}|\Z)", lambda found: found[1][: len(found[1]) // 2] + found[2], text[1:-1])


def split_list(text: str) -> list[str]:
    """The elements of ``[a, 'b,c', [d, e]]``, split at commas outside quotes and brackets.

    A bracket or a quote without its closing one is an ordinary character.
    """
    elements, start, at = list[str](), 0, 0
    inner = text[1:-1]
    while at < len(inner):
        if inner[at] in _PAIRS:
            at = _closing_bracket(inner, at)
        elif inner[at] in "'\"" and not inner[start:at].strip():
            quote = re.compile(_in_quotes(inner[at]), re.DOTALL).match(inner, at)
            at = quote.end() - 1 if quote else at
        elif inner[at] == ",":
            elements.append(inner[start:at].strip())
            start = at + 1
        at += 1
    last = inner[start:].strip()
    return [*elements, last] if last or elements else []


def _closing_bracket(text: str, start: int) -> int:
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == text[start]) - (text[at] == _PAIRS[text[start]])
        if depth == 0:
            return at
    return start


def members(annotation: Any) -> list[Any]:
    """The types of a union, or the one type there is; ``Annotated`` is taken off."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in members(part)]
    return [annotation]


def read_value(text: str, annotation: Any) -> Any:
    """A value of the command line by the type of its key, None where that is unknown; quotes around all of it are taken off.

    Raises:
        ConfigError: braces or brackets that can't be read.
    """
    kinds = [kind for kind in members(annotation) if kind is not None]
    if text.lower() == "null" and (type(None) in kinds or str not in kinds):
        return None
    inside = _unquoted(text)
    if inside is not None:
        return inside
    sequence = next((kind for kind in kinds if get_origin(kind) in (list, tuple)), None)
    if sequence is not None and text.startswith("[") and text.endswith("]"):
        elements, of = split_list(text), [kind for kind in get_args(sequence) if kind is not Ellipsis]
        return [read_value(element, of[min(at, len(of) - 1)]) for at, element in enumerate(elements)]
    if str in kinds and not {int, float, bool} & set(kinds):
        return text
    if any(get_origin(kind) is Literal and text in get_args(kind) for kind in kinds):
        return text
    return _read_tree(text) if text.startswith(("{", "[")) else _read_scalar(text, kinds)


def _read_tree(text: str) -> Any:
    """``{key: value}``, or a list whose type is unknown, by Hydra's grammar."""
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
        if not override.is_sweep_override():
            return override.value()
    except HydraException:
        pass
    raise ConfigError(
        f"{text!r} can't be read: write {{key: value, other: value}} or [one, two], and quote texts that hold more than "
        "letters and digits."
    )


def _read_scalar(text: str, kinds: list[Any]) -> Any:
    if str in kinds:  # `7` is a number, `007` and `1e5` are names
        return int(text) if int in kinds and text.isdecimal() and str(int(text)) == text else text
    known: dict[str, Any] = {"true": True, "false": False} | ({"none": None} if type(None) in kinds else {})
    if text.lower() in known:
        return known[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text
