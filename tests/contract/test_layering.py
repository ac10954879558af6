"""Who may import whom: down only (docs/architecture.md). The test reads import statements."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ssl_pipeline"
LEVELS = [
    {"rng", "config"},
    {"schedules"},
    {"transforms"},
    {"models", "losses"},
    {"pretext", "downstream", "domain", "evaluation", "metrics", "data", "engine", "logging"},
    {"pretrain", "finetune"},
    {"study", "export", "report"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
ONLY_IN = {
    "hydra": {"config"},
    "wandb": {"logging"},
    "wandb_workspaces": {"logging"},
    "accelerate": {"engine", "logging", "pretrain", "finetune", "downstream/regime.py"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "ssl_pipeline" and len(parts) > 1 and parts[1] in LEVEL:
            assert LEVEL[parts[1]] <= LEVEL[room], f"{room} imports {name}, which stands above it"
            assert {room, parts[1]} != {"pretext", "downstream"}, f"{path} imports {name}"
        elif parts[0] in ONLY_IN:
            allowed = ONLY_IN[parts[0]]
            assert room in allowed or str(path.relative_to(PACKAGE)) in allowed, f"{path} imports {name}"


def test_config_imports_no_component() -> None:
    for path in (PACKAGE / "config").glob("*.py"):
        inside = {n.split(".")[1] for n in imports(path) if n.startswith("ssl_pipeline.")}
        assert inside <= {"config"}, f"{path} imports {inside}"


def test_every_room_has_a_level() -> None:
    assert {room_of(path) for path in FILES} - {"__init__"} <= set(LEVEL)
