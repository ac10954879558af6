"""Docstrings as Markdown: the prose, and what the section ``Attributes`` says of each key."""

from __future__ import annotations

import inspect
import re
import textwrap

_SECTION = re.compile(r"^(Attributes|Args|Returns|Raises):$", re.MULTILINE)
_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)
_EQUATION = re.compile(r"\.\. math:: *\n?")
_ROLE = re.compile(r":\w+:`~?([^`]+)`")


def prose(text: str | None) -> str:
    """A docstring without its sections: paragraphs, and indented equations as blocks."""
    body = _SECTION.split(inspect.cleandoc(text or ""))[0].strip()
    paragraphs = [_block(paragraph) for paragraph in re.split(r"\n\s*\n", body)]
    return "\n\n".join(paragraphs)


def attributes(schema: type) -> dict[str, str]:
    """What is said of each attribute, by the class or by the nearest of its bases."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        section = text.partition("Attributes:\n")[2]
        found |= {name: _inline(" ".join(said.split())) for name, said in _ATTRIBUTE.findall(section)}
    return found


def _block(paragraph: str) -> str:
    equation = _EQUATION.match(paragraph)
    if equation:
        lines = paragraph[equation.end() :].splitlines()
        return f"```text\n{chr(10).join(line.strip() for line in lines)}\n```"
    if all(line.startswith("    ") for line in paragraph.splitlines()):
        return f"```text\n{textwrap.dedent(paragraph)}\n```"
    return _inline(paragraph)


def _inline(text: str) -> str:
    return _ROLE.sub(lambda role: f"`{role[1].rpartition('.')[2]}`", text).replace("``", "`")
