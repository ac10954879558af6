"""Secrets are kept out of what a run writes and sends: by the names of their keys, and by what they look like."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_REDACTED = "<redacted>"
_SECRET_WORDS = {
    "key", "token", "secret", "secrets", "password", "passwords", "passwd", "apikey", "credential", "credentials",
}  # fmt: skip
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_SETTING = re.compile(r"([\w.\-]+)(['\"]?\s*[:=]\s*)([^,}\]]+)")
_SECRET_VALUE = re.compile(
    r"\b(?:hf_|gh[opsur]_|sk-|xox[abp]-|AKIA|wandb_v\d_)[\w\-]{8,}"  # by the prefix that a service gives its keys
    r"|(?<![\w/.\-])[0-9a-fA-F]{40,}(?![\w/.\-])"  # a bare hexadecimal key, such as W&B's
    r"|(?<=://)[^/\s@]+(?=@)"  # user:password@ of an address
    r"|(?<=[?&])(?i:[\w\-]*(?:token|key|sig|signature|credential|secret|password))=[^&\s'\"]+"  # of a signed address
)


def redact(tree: Any) -> Any:
    """The same tree without secrets: what keys such as ``api_key`` and ``password`` hold, and texts that look like one."""
    if isinstance(tree, dict):
        return {k: _REDACTED if _is_secret(str(k)) and v is not None else redact(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact(value) for value in tree]
    return _SECRET_VALUE.sub(_REDACTED, tree) if isinstance(tree, str) else tree


def redact_command(words: Sequence[str]) -> list[str]:
    """A command line without secrets: ``a.token=…``, ``--api-key …``, and whatever looks like a key by itself."""
    shown: list[str] = []
    hide_next = False
    for word in words:
        name, equals, _ = word.partition("=")
        if hide_next:
            shown.append(_REDACTED)
            hide_next = False
        elif equals and _is_secret(name):
            shown.append(f"{name}={_REDACTED}")
        else:
            hide_next = word.startswith("-") and not equals and _is_secret(word)
            shown.append(_SECRET_VALUE.sub(_REDACTED, _SETTING.sub(_redact_setting, word)))
    return shown


def _is_secret(name: str) -> bool:
    return any(word.lower() in _SECRET_WORDS for word in _WORD.findall(name))


def _redact_setting(found: re.Match[str]) -> str:
    name, sign, _ = found.groups()
    return f"{name}{sign}{_REDACTED}" if _is_secret(name) else found.group()
