"""One page a task or method: its module's docstring (equation, when to use it, paper), its recipes, its keys."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from docs.site.docstrings import prose
from docs.site.reference import component_table
from ssl_pipeline.config.compose import choices, config_root
from ssl_pipeline.config.schema import module_of, names

# Page titles where the module's name is not how people write it.
TITLES = {
    "barlow_twins": "Barlow Twins", "byol": "BYOL", "dcl": "DCL", "dclw": "DCLW", "dino": "DINO", "moco_v2": "MoCo v2",
    "moco_v3": "MoCo v3", "nnclr": "NNCLR", "simclr": "SimCLR", "simsiam": "SimSiam", "supcon": "SupCon", "swav": "SwAV",
    "vicreg": "VICReg", "multi_label": "Multi-label classification", "adabn": "AdaBN", "coral": "CORAL",
    "coral_over_sources": "CORAL over sources", "dance": "DANCE", "dann": "DANN", "erm": "ERM", "mcc": "MCC", "mixstyle": "MixStyle",
    "mmd": "MMD", "shot_im": "SHOT-IM", "source_only": "Source-only",
}  # fmt: skip
STAGES = {"pretext": "pretrain", "downstream": "finetune"}
ROOMS = {**STAGES, "domain": "finetune"}
_MORE = {"domain": " 'domain.target=[sketch]' encoder=RUN"}  # what a command of the room needs beside its choice


def pages() -> dict[PurePosixPath, str]:
    """The pages of all tasks, and of the methods across domains, by their place below ``docs``."""
    return {PurePosixPath("reference", room, f"{name}.md"): _page(room, name) for room in ROOMS for name in names(room)}


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
    module = module_of(room, name)
    source = f"{module.__name__.replace('.', '/')}.py"
    listed = "\n".join(f"- [`{recipe}`](../../../configs/recipe/{recipe}.yaml)" for recipe in recipes_of(room, name))
    parts = [
        f"# {title(name)}", prose(module.__doc__), f"```bash\nssl-pipeline {ROOMS[room]} {room}={name}{_MORE.get(room, '')}\n```",
        *([f"## Recipes\n\nPublished settings ([all](../../recipes.md)):\n\n{listed}"] if listed else []),
        "## Keys", f"{prose(module.Config.__doc__)}", component_table(room, room, name),
        f"Source: [`{source.partition('/')[2]}`](../../../{source}).", "",
    ]  # fmt: skip
    return "\n\n".join(parts)
