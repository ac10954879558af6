"""``ssl-pipeline plot-temperature [RUN]``: a picture of what the temperature does, from the glossary's example to a real run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssl_pipeline.config import options as parsers
from ssl_pipeline.config.base import ConfigError, UserError
from ssl_pipeline.config.command import exit_with_error
from ssl_pipeline.config.schema import resolve
from ssl_pipeline.data.build import build_loader, build_views
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.data.source import at_range_of, open_training
from ssl_pipeline.logging.jsonl import FILE_NAME, read_metrics
from ssl_pipeline.logging.progress import console
from ssl_pipeline.losses.temperature import entropy_share, softmax, temperature_metrics
from ssl_pipeline.models.encoder import load_encoder
from ssl_pipeline.pretrain_config import PretrainConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLE = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
TEMPERATURES = [0.01 * 2 ** (step / 3) for step in range(24)]
NAMES = {
    "entropy_share": "entropy ÷ log of the candidates",
    "p_positive": "p(positive)",
    "hardest_1pct": "gradient on the hardest 1 %",
    "hardest_5pct": "gradient on the hardest 5 %",
}


def draw(run: Path | None, output: Path) -> Path:
    """Saves the picture of a stage-one run, or of the example alone, as .svg, .png or .pdf."""
    from matplotlib.figure import Figure

    if output.suffix not in (".svg", ".png", ".pdf"):
        raise ConfigError(f"--output: {str(output)!r} is no picture's name: end it in .svg, .png or .pdf.")
    rows = 1 if run is None else 2
    figure = Figure(figsize=(11, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    _example(axes[0, 0], axes[0, 1])
    if run is not None:
        _real_images(axes[1, 0], run)
        _course(axes[1, 1], run)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)
    return output


def _example(bars: Axes, curves: Axes) -> None:
    for place, temperature in enumerate((0.5, 1.0, 2.0)):
        heights = softmax(EXAMPLE, temperature).tolist()
        drawn = bars.bar([x + 0.27 * (place - 1) for x in range(3)], heights, 0.25, label=f"τ = {temperature:g}")
        bars.bar_label(drawn, [f"{height:.2f}" for height in heights], fontsize=8)
    bars.set(title="The softmax of the logits 1, 2, 3", xticks=range(3), xticklabels=["1", "2", "3"], xlabel="logit")
    bars.set(ylabel="probability", ylim=(0, 1))
    bars.legend()
    many = [0.1 * 2 ** (step / 4) for step in range(28)]
    curves.plot(many, [float(entropy_share(EXAMPLE, t)) for t in many], label="entropy ÷ log 3")
    curves.plot(many, [-math.log(float(softmax(EXAMPLE, t)[2])) for t in many], label="cross-entropy of the top logit")
    curves.axhline(math.log(3), color="gray", linewidth=0.8, linestyle="--")
    curves.annotate("log 3: all alike", (many[0], math.log(3)), (0, 3), textcoords="offset points", fontsize=8)
    curves.set(title="Above 1 it smooths, below 1 it sharpens", xscale="log", xlabel="τ")
    curves.legend()


def _real_images(axes: Axes, run: Path) -> None:
    """Two views of 256 images of the run's data, through the run's encoder, at every temperature."""
    first, second, name = _two_views(run)
    rows, place = torch.cat([first, second]), torch.arange(2 * len(first))
    pairs = place % len(first)
    found = [temperature_metrics(rows, rows, (pairs, pairs), t, own=(place, place)) for t in TEMPERATURES]
    for key, label in NAMES.items():
        axes.plot(TEMPERATURES, [float(figures[key]) for figures in found], label=label)
    axes.set_title(f"The encoder's features of {len(first)} images of {name}", parse_math=False)
    axes.set(xscale="log", xlabel="τ", ylim=(0, 1.02))
    axes.legend(fontsize=8)


@torch.no_grad()
def _two_views(run: Path) -> tuple[Tensor, Tensor, str]:
    encoder, card = load_encoder(run)
    config = resolve(PretrainConfig, card.config)
    train, blueprint = open_training(at_range_of(config.data, str(run))), card.blueprint
    views = config.transform.model_copy(
        update={"num_views": 2, "local_views": config.transform.local_views.model_copy(update={"count": 0})}
    )
    settled = build_views(train, views.for_channels(train.channels)[0], blueprint.mean, blueprint.std, config.seed)
    length = train.length
    count = 256 if length is None else min(256, length)
    share = DistInfo(0, 1, torch.device("cpu"))
    batches = build_loader(train, settled, count, config.seed, share, 1, 0, with_labels=False)
    encoder.eval()
    first, second = (encoder.features(view) for view in next(iter(batches.from_step(0))).views)
    return first, second, train.name


def _course(axes: Axes, run: Path) -> None:
    lines = read_metrics(run / FILE_NAME)
    for key, label in {"temperature": "τ, as it was used", **NAMES}.items():
        points = [(line["step"], line[f"temperature/{key}"]) for line in lines if f"temperature/{key}" in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color="black" if key == "temperature" else None)
    axes.set(title="The course of the run (its projections)", xlabel="optimizer step", ylim=(0, 1.02))
    if axes.lines:
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    else:
        axes.annotate("this pretext task logs no temperature", (0.5, 0.5), xycoords="axes fraction", ha="center")


def main() -> None:
    """The command line."""
    options = parsers.parser("plot-temperature").parse_args()
    output = options.output or (options.run or Path()) / "temperature.svg"
    try:
        path: Any = draw(options.run, output)
    except UserError as error:
        exit_with_error(error)
    console().print(f"wrote {path}")
