"""One page a task: its module's docstring (equation, when to use it, paper), its recipes, its keys."""

from __future__ import annotations

import importlib
import re
from pathlib import PurePosixPath

from ssl_pipeline.config.compose import choices, config_root
from ssl_pipeline.config.resolve import names
from website.docstrings import prose
from website.reference import component_table

# Page titles where the module's name is not how people write it.
TITLES = {
    "barlow_twins": "Barlow Twins", "byol": "BYOL", "dcl": "DCL", "dclw": "DCLW", "dino": "DINO", "moco_v2": "MoCo v2",
    "moco_v3": "MoCo v3", "nnclr": "NNCLR", "simclr": "SimCLR", "simsiam": "SimSiam", "supcon": "SupCon", "swav": "SwAV",
    "vicreg": "VICReg", "multi_label": "Multi-label classification",
}  # fmt: skip
STAGES = {"pretext": "pretrain", "downstream": "finetune"}


def pages() -> dict[PurePosixPath, str]:
    """The pages of all pretext and downstream tasks by their place below ``docs``."""
    return {
        PurePosixPath("reference", room, f"{name}.md"): _page(room, name) for room in STAGES for name in names(room)
    }


def title(name: str) -> str:
    """A task's name as a page's title."""
    return TITLES.get(name, name.replace("_", " ").capitalize())


def recipes_of(room: str, name: str) -> list[str]:
    """The recipes that choose a task."""
    pattern = re.compile(rf"^  - override /{room}: {name}$", re.MULTILINE)
    return [
        recipe for recipe in choices("recipe") if pattern.search((config_root() / f"recipe/{recipe}.yaml").read_text())
    ]


def _page(room: str, name: str) -> str:
    module = importlib.import_module(f"ssl_pipeline.{room}.{name}")
    listed = "\n".join(f"- [`{recipe}`](../../../configs/recipe/{recipe}.yaml)" for recipe in recipes_of(room, name))
    parts = [
        f"# {title(name)}", prose(module.__doc__), f"```bash\nssl-pipeline {STAGES[room]} {room}={name}\n```",
        *([f"## Recipes\n\nPublished settings ([all](../../recipes.md)):\n\n{listed}"] if listed else []),
        "## Keys", f"{prose(module.Config.__doc__)}", component_table(room, room, name),
        f"Source: [`{room}/{name}.py`](../../../ssl_pipeline/{room}/{name}.py).", "",
    ]  # fmt: skip
    return "\n\n".join(parts)
