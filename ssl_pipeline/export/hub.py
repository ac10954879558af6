"""A folder for the Hugging Face Hub: weights, card and model page. Nothing is sent without ``--push``."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from ssl_pipeline.config.base import ConfigError, UserError, first_line
from ssl_pipeline.config.schema import component
from ssl_pipeline.downstream.task import DownstreamConfig
from ssl_pipeline.export.parts import ExportBundle
from ssl_pipeline.models.encoder import Card, save

_MOST_CLASSES = 200


def write_folder(parts: ExportBundle, folder: Path, for_hub: bool = False) -> None:
    """Writes ``<kind>.safetensors`` and ``card.json``, which every verb of ours reads.

    For the Hub also the page ``README.md``, and ``config.json``, which it counts downloads by.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save(folder, parts.module, parts.card)
    if for_hub:
        (folder / "README.md").write_text(page(parts.card, folder.name), encoding="utf-8")
        blueprint = parts.card.blueprint.model_dump(mode="json")
        facts = {"library": "ssl-pipeline", "kind": parts.card.kind, "classes": parts.card.classes, **blueprint}
        (folder / "config.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")


def page(card: Card, name: str) -> str:
    """The model card in Markdown, with the Hub's metadata at its head."""
    blueprint, task, model = card.blueprint, _task(card), card.kind == "model"
    tags = ["self-supervised-learning", blueprint.backbone.name.removeprefix("timm/")]
    if task:
        tags.append(task.name.rpartition(".")[2].replace("_", "-"))
    kind = (task.pipeline_tag if task else None) if model else "image-feature-extraction"
    head = ModelCardData(library_name="ssl-pipeline", pipeline_tag=kind, tags=tags)
    shape = f"central square at {blueprint.size} px"
    if task is not None and not task.reads_square:
        shape = f"whole image, resized to a square at {blueprint.size} px"
    elif blueprint.resize is not None:
        shape = blueprint.resize.describe(blueprint.size)
    pretext = card.config.get("pretext")
    method = pretext.get("name") if isinstance(pretext, dict) else None
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (blueprint.mean, blueprint.std))
    facts = {
        "backbone": f"{blueprint.backbone.name}, neck {blueprint.neck.name}",
        "learned by": f"pretext task {method}" if method else "stage two on labels" if model else "not recorded",
        "images": f"{card.data.get('name')} (license: {card.data.get('license') or 'not known'})",
        "input": f"{blueprint.channels} channel(s), {shape}",
        "normalization": f"mean {mean}, std {std} of values in [0, 1]",
        "made": f"{card.created or 'now'}, torch {card.versions.get('torch', '?')}",
    }
    lines = [f"---\n{head.to_yaml()}\n---\n", f"# {name}", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in facts.items()), ""]
    if card.figures:
        lines += ["## Figures", "", "| figure | value |", "| --- | --- |"]
        lines += [f"| {key} | {value:.4g} |" for key, value in card.figures.items()]
        lines += ["", "As the run recorded them; `card.json` holds the configuration that says on which images.", ""]
    if card.classes:
        shown = ", ".join(card.classes[:_MOST_CLASSES])
        lines += ["## Classes", "", shown + (", …" if len(card.classes) > _MOST_CLASSES else ""), ""]
    words = "predict FOLDER photos --format csv"
    if not model:
        words = "embed FOLDER data=folder data.path=photos output=features.npz"
    lines += ["## Use", "", "In a clone of ssl_pipeline:", ""]
    lines += ["```bash", "pip install -e .", f"ssl-pipeline {words}", "```", ""]
    lines.append(
        "The weights are safetensors under the library's own names after `backbone.trunk.`; `card.json` says the rest.\n"
    )
    return "\n".join(lines)


def _task(card: Card) -> DownstreamConfig | None:
    """The downstream task of a model; None for an encoder, and where the task's module is not on this machine."""
    if card.kind != "model":
        return None
    try:
        task = component("downstream", "downstream", card.config.get("downstream", {}))
    except UserError:
        return None
    return task if isinstance(task, DownstreamConfig) else None


def push(folder: Path, repository: str, public: bool) -> str:
    """Sends the folder to the Hub; returns its address. The repository is private unless ``public``.

    Raises:
        ConfigError: no token, no such right, no network.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError, ValueError) as error:
        raise ConfigError(
            f"the folder {str(folder)!r} is written and was not sent to {repository!r}: {first_line(error)} Log in with `hf auth login`, and "
            "name the repository OWNER/NAME."
        ) from error
    return str(address)
