"""Who may import whom: down only (docs/architecture.md). The test reads import statements."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.contract.parsed import FILES, PACKAGE, parsed

# A strict order: a room imports those before it, and no other.
ORDER = [
    "config", "rng", "schedules", "logging", "transforms", "data", "losses", "models", "engine", "metrics", "evaluation", "pretext",
    "downstream", "domain", "pretrain_config", "finetune_config", "pretrain", "finetune", "study", "export", "report", "cli",
]  # fmt: skip
LEVEL = {room: level for level, room in enumerate(ORDER)}
ONLY_IN = {
    "hydra": {"config"},
    "wandb": {"logging"},
    "wandb_workspaces": {"logging"},
    "accelerate": {"engine", "logging", "pretrain", "finetune", "downstream/plan.py", "downstream/regime.py"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def strays(path: Path) -> list[str]:
    """What a file imports that it may not."""
    room, found = room_of(path), list[str]()
    if room == "__init__":
        return found
    where = str(path.relative_to(PACKAGE))
    for name in sorted(imports(path)):
        parts = name.split(".")
        if parts[0] == "ssl_pipeline" and len(parts) > 1 and parts[1] in LEVEL:
            if LEVEL[parts[1]] > LEVEL[room]:
                found.append(f"{where} imports {name}, which comes after it")
            if {room, parts[1]} == {"pretext", "downstream"}:
                found.append(f"{where} imports {name}")
        elif parts[0] in ONLY_IN and not {room, where} & ONLY_IN[parts[0]]:
            found.append(f"{where} imports {name}")
    return found


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room_of(path) for path in FILES} - {"__init__"} == set(ORDER)


def test_imports_follow_the_order() -> None:
    assert len(FILES) > 100
    assert [stray for path in FILES for stray in strays(path)] == []


def test_config_imports_no_component() -> None:
    for path in (PACKAGE / "config").glob("*.py"):
        inside = {n.split(".")[1] for n in imports(path) if n.startswith("ssl_pipeline.")}
        assert inside <= {"config"}, f"{path} imports {inside}"


def test_every_room_has_a_level() -> None:
    assert {room_of(path) for path in FILES} - {"__init__"} <= set(LEVEL)
