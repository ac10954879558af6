"""``ssl-pipeline dashboard ENTITY/PROJECT``: a W&B workspace with a section for each group of metrics."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from ssl_pipeline.config import options as parsers
from ssl_pipeline.config.base import ConfigError, UserError, first_line
from ssl_pipeline.config.command import exit_with_error
from ssl_pipeline.logging.jsonl import TRAINING_STEP

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

NAME = "ssl-pipeline"
CURVES = {
    "pretrain": ("loss", "lr", "epoch"),
    "eval": ("knn", "feature_std", "effective_rank", "alignment", "uniformity"),
    "temperature": ("tau", "entropy_share", "effective_negatives", "p_positive", "hardest_1pct", "hardest_5pct"),
    "finetune": ("loss", "lr", "validation_accuracy"),
    "system": ("images_per_s", "data_wait"),
}
MEDIA = ("views", "neighbors", "embedding_map", "confusion")
SPLITS = ("test", "val")


def build(entity: str, project: str) -> Workspace:
    """The workspace; asks no server.

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ConfigError(
            'the dashboard needs wandb-workspaces: in the project\'s folder `pip install -e ".[dashboard]"` installs it.'
        ) from error
    sections = [
        workspaces.Section(
            name=group,
            panels=[
                panels.LinePlot(title=name, x=TRAINING_STEP if group == "finetune" else "step", y=[f"{group}/{name}"])
                for name in names
            ],
            is_open=True,
        )
        for group, names in CURVES.items()
    ]
    pictures = [panels.MediaBrowser(title=name, media_keys=[f"media/{name}"], num_columns=2) for name in MEDIA]
    sections.append(workspaces.Section(name="media", panels=pictures, is_open=True))
    for split in SPLITS:
        bars = panels.BarPlot(title="accuracy", metrics=[f"{split}/accuracy"])
        # Label efficiency is a matter of several runs: each is a point at its number of labels.
        labels = panels.ScatterPlot(
            title="label efficiency",
            x=panels.Config("labels.per_class"),
            y=panels.SummaryMetric(f"{split}/accuracy"),
            log_x=True,
        )
        sections.append(workspaces.Section(name=f"finetune on {split}", panels=[bars, labels], is_open=True))
    return workspaces.Workspace(entity=entity, project=project, name=NAME, sections=sections)


def publish(entity: str, project: str) -> str:
    """Saves the workspace as a new view of the project.

    Returns:
        Its address.

    Raises:
        ConfigError: no key, no network, or no such project.
    """
    workspace = build(entity, project)
    logging.getLogger("wandb").setLevel(logging.ERROR)
    try:
        workspace.save()
    except Exception as error:  # a client's, the network's, or the server's
        raise ConfigError(
            f"the dashboard of {entity}/{project} can't be saved ({first_line(error)}): it needs W&B's server and a key that may "
            "write there. Try `wandb login`, and log a run to the project first."
        ) from error
    return str(workspace.url)


def main() -> None:
    """The command line."""
    options = parsers.parser("dashboard").parse_args()
    entity, slash, project = options.project.partition("/")
    try:
        if not (entity and slash and project) or "/" in project:
            raise ConfigError(f"{options.project!r} is no project: write ENTITY/PROJECT, such as my-team/ssl_pipeline.")
        address = publish(entity, project)
    except UserError as error:
        exit_with_error(error)
    sys.stdout.write(f"made {address}\n")


if __name__ == "__main__":
    main()
