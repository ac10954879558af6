"""All messages that a person can get for a mistake, read from the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

from docs.site.verbs import ROOT

GAP = "…"  # stands for what a message fills in
_ERRORS = re.compile(r"\w*Error$")


def pages() -> dict[PurePosixPath, str]:
    """The page of all messages, by module."""
    lines = [
        "# All messages", "",
        f"What a person can mend is told in a sentence, with exit code 2. `{GAP}` stands for what a message fills in. "
        "The common ones are explained in [Troubleshooting](../troubleshooting.md).", "",
    ]  # fmt: skip
    for path, messages in all_messages().items():
        lines += [f"## {path}", "", *(f"- {_told(message)}" for message in messages), ""]
    return {PurePosixPath("reference/messages.md"): "\n".join(lines)}


@cache
def all_messages() -> dict[str, list[str]]:
    """The messages of each module, in order, by its path below the package."""
    found = {}
    for path in sorted((ROOT / "ssl_pipeline").rglob("*.py")):
        messages = messages_of(path)
        if messages:
            found[path.relative_to(ROOT / "ssl_pipeline").as_posix()] = messages
    return found


def messages_of(path: Path) -> list[str]:
    """The messages of one file, each once."""
    return list(dict.fromkeys(_messages(ast.parse(path.read_text()))))


def _messages(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and _tells(node):
            yield from (text for argument in node.args for text in _texts(argument) if " " in text and len(text) > 25)
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("about_"):  # answers a word that is not known
            answers = (part.value for part in ast.walk(node) if isinstance(part, ast.Return) and part.value is not None)
            yield from (text for answer in answers for text in _texts(answer) if " " in text and len(text) > 25)


def _tells(call: ast.Call) -> bool:
    """Whether a call raises a mistake, or adds to the list of them."""
    match call.func:
        case ast.Name(id=name):
            return bool(_ERRORS.search(name))
        case ast.Attribute(value=ast.Name(id=owner), attr="append"):
            return owner in ("problems", "found", "faults")
    return False


def _texts(node: ast.AST) -> Iterator[str]:
    """The sentences in an expression: of a list each, of a text its parts as one."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=values):
            yield re.sub(f"{GAP}+", GAP, "".join(str(v.value) if isinstance(v, ast.Constant) else GAP for v in values))
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            for part in parts:
                yield from _texts(part)
        case ast.ListComp(elt=part):
            yield from _texts(part)
        case ast.IfExp(body=first, orelse=second):
            yield from _texts(first)
            yield from _texts(second)


def _told(message: str) -> str:
    return " ".join(message.split()).replace("<", "&lt;").replace("*", r"\*")
