"""The picture of a shift: held-out images of source and target in the plane of each model's features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.domain.plan import DomainPlan
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.load_model import load_model
from ssl_pipeline.downstream.plan import Plan
from ssl_pipeline.evaluation.features import extract_readable
from ssl_pipeline.evaluation.plots import pca_projection
from ssl_pipeline.transforms.preprocessing import Preprocessing

_MOST = 300  # points of a domain: more of them hide one another
# Okabe and Ito's two that differ most, also in their lightness.
_DOMAINS = ("#0072B2", "#E69F00")


@dataclass(frozen=True)
class EmbeddingPlot:
    """The images of a map.

    Attributes:
        plane: their places, shape (N, 2).
        domain: 0 for the source, 1 for the target; shape (N,).
        label: their classes, int64 of shape (N,).
        classes: the classes' names.
    """

    plane: Tensor
    domain: Tensor
    label: Tensor
    classes: tuple[str, ...]


def spots(folder: Path, plan: Plan) -> EmbeddingPlot:
    """The held-out images of a plan across domains, in the plane of a model's features (two principal components)."""
    assert isinstance(plan, DomainPlan)
    model = load_model(folder)
    assert isinstance(model.task, Classification)
    blueprint, share = model.card.blueprint, DistInfo(0, 1, torch.device("cpu"))
    preprocessing = Preprocessing.of(blueprint)
    features, domains, labels = list[Tensor](), list[Tensor](), list[Tensor]()
    for name, images in plan.domains.measured.items():
        index = torch.linspace(0, len(images) - 1, min(len(images), _MOST)).round().long()
        rows, read = extract_readable(model.task, images, preprocessing, share, index, model.task.neck_features)
        features.append(rows)
        domains.append(torch.full((len(read),), int(name in plan.domains.targets)))
        assert images.labels is not None
        labels.append(images.labels[read])
    plane, _ = pca_projection(torch.cat(features))
    return EmbeddingPlot(plane, torch.cat(domains), torch.cat(labels), model.classes)


def draw(title: str, panels: Mapping[str, EmbeddingPlot], file: Path) -> None:
    """Saves the picture: a column for each model, colored by domain above and by class below.

    Args:
        title: of the picture.
        panels: by the column's heading.
        file: its ending says the format.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(0.9 + 2.7 * len(panels), 6.6), layout="constrained")
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(2, len(panels), squeeze=False)
    classes = max((found.classes for found in panels.values()), key=len)
    palette = colormaps["tab10" if len(classes) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    for (heading, found), (above, below) in zip(panels.items(), axes.T, strict=True):
        # In no order of domains, so that neither lies on top of the other.
        order = torch.randperm(len(found.plane), generator=torch.Generator().manual_seed(0)).tolist()
        x, y = found.plane[order].T.tolist()
        domain, label = found.domain[order].tolist(), found.label[order].tolist()
        above.scatter(x, y, s=7, linewidths=0, alpha=0.7, c=[_DOMAINS[d] for d in domain])
        above.set_title(heading, fontsize=9, parse_math=False)
        # The target's images are the ones to look at: the source's are small beside them.
        sizes = [12 if d else 4 for d in domain]
        below.scatter(x, y, s=sizes, linewidths=0, alpha=0.8, c=[palette[c % len(palette)] for c in label])
        for panel in (above, below):
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_linewidth(0.4)
    axes[0, 0].set_ylabel("by domain")
    axes[1, 0].set_ylabel("by class (large: target)")
    for row, (colors, names) in enumerate(((_DOMAINS, ("source", "target")), (palette, classes))):
        style: dict[str, Any] = {"marker": "o", "linestyle": "", "markersize": 5}
        marks = [
            Line2D([], [], color=colors[n % len(colors)], label=name.replace("$", r"\$"), **style)
            for n, name in enumerate(names)
        ]
        axes[row, -1].legend(handles=marks, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
