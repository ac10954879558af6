"""Which verb of the command line reads which configuration: found in the code, so that a new verb needs no list."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pydantic import BaseModel

from ssl_pipeline.cli import VERBS

ROOT = Path(__file__).parents[2]
_CALL = re.compile(r"run_command\(\s*\"(?P<config>\w+)\", (?P<schema>\w+),")


@dataclass(frozen=True)
class Verb:
    """A verb that is told what to do by a configuration.

    Attributes:
        name: as on the command line.
        config: the YAML that it starts from, ``configs/<config>.yaml``.
        schema: what checks it.
    """

    name: str
    config: str
    schema: type[BaseModel]

    @property
    def page(self) -> str:
        """The name of its page."""
        return f"{self.name.replace(' ', '_')}.md"


def configured_verbs() -> list[Verb]:
    """All verbs that read a configuration; the others take options (``--help`` lists them)."""
    found = []
    for name, (module, _) in VERBS.items():
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        call = _CALL.search(Path(spec.origin).read_text())
        if call:
            found.append(Verb(name, call["config"], getattr(importlib.import_module(module), call["schema"])))
    return found
