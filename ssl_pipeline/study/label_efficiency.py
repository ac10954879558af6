"""Did pretraining help? Stage two under several conditions with the same seeds, in one table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from pydantic import Field

from ssl_pipeline.config.base import ConfigError, Strict, dump
from ssl_pipeline.config.command import load, run_command
from ssl_pipeline.data.loader import Preprocessing
from ssl_pipeline.downstream.regime import RegimeConfig
from ssl_pipeline.draws import derive_seed
from ssl_pipeline.engine.distributed import share_of, start_accelerator
from ssl_pipeline.evaluate.features import extract
from ssl_pipeline.evaluate.interval import Interval, interval, paired_difference
from ssl_pipeline.evaluate.knn import knn_accuracy
from ssl_pipeline.finetune import FinetuneConfig, finetune, starting_point
from ssl_pipeline.track.progress import console, print_table
from ssl_pipeline.track.run import open_run, write_text_atomic


class StudyConfig(Strict):
    """What is compared.

    Attributes:
        encoder: a stage-one run's folder.
        common: overrides of ``finetune.yaml`` for all conditions.
        conditions: per condition its own overrides.
        baseline: the condition that the others are compared with.
        seeds: label draws, heads and views per condition; paired. Stage one is shared.
        output: the study's folder.
    """

    encoder: str
    common: tuple[str, ...] = ()
    conditions: dict[str, list[str]] = Field(min_length=1)
    baseline: str
    seeds: int = Field(5, ge=1)
    output: str | None = None


def study(config: StudyConfig) -> Path:
    """Compares initialisations and regimes of stage two, and says what pretraining bought."""
    if config.baseline not in config.conditions:
        raise ConfigError(f"`baseline` {config.baseline!r} is none of the conditions: {', '.join(config.conditions)}.")
    shared = [f"encoder={config.encoder}", f"seeds={config.seeds}", *config.common]
    folder = Path(config.output or "runs/study")
    settled = {
        name: load("finetune", FinetuneConfig, [*shared, *own, f"output={folder / _slug(name)}"])
        for name, own in config.conditions.items()
    }
    with open_run(config.output, "study", "no", dump(config)) as run:
        values = {}
        for name, condition in settled.items():
            condition = condition.model_copy(update={"output": str(run.path / _slug(name))})
            values[name] = [figures["accuracy"] for figures in finetune(condition).figures]
            console().print(f"  {name}: {interval(values[name]).percent()} %")
        knn = neighbours_before_and_after(next(iter(settled.values())))
        table = tabulate(values, config.baseline)
        print_table(f"accuracy (%) on {next(iter(settled.values())).split}, {config.seeds} seeds", *table)
        sentences = conclude(values, config.baseline, knn)
        console().print("\n".join(sentences))
        record = {"accuracy": values, "baseline": config.baseline, "knn": knn, "conclusion": sentences}
        write_text_atomic(run.path / "study.json", json.dumps(record, indent=1))
        return run.path


def neighbours_before_and_after(condition: FinetuneConfig) -> dict[str, float]:
    """KNN accuracy on the held-out split, of the encoder and of the same architecture with fresh weights."""
    train, held_out = condition.data.open("train"), condition.data.open(condition.split)
    assert train is not None
    assert held_out is not None
    assert train.labels is not None
    assert held_out.labels is not None
    blueprint, pretrained = starting_point(
        condition.model_copy(update={"initialisation": "pretrained", "regime": RegimeConfig()}), train
    )
    torch.manual_seed(derive_seed(condition.seed, "initialisation"))
    encoders = {"untrained": blueprint.build()[0], "pretrained": pretrained}
    share = share_of(start_accelerator())
    preprocessing = Preprocessing(blueprint.size, blueprint.mean, blueprint.std)
    found = {}
    for name, encoder in encoders.items():
        assert encoder is not None
        encoder = encoder.to(share.device)
        bank, queries = (extract(encoder, source, preprocessing, share) for source in (train, held_out))
        found[name] = knn_accuracy(queries, held_out.labels, bank, train.labels, len(train.classes or ()))
    return found


def tabulate(values: dict[str, list[float]], baseline: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: accuracy with its interval, and the paired difference from the baseline."""
    rows = []
    for name, accuracies in values.items():
        difference = "" if name == baseline else paired_difference(accuracies, values[baseline]).percent(signed=True)
        rows.append([name, interval(accuracies).percent(), difference])
    return ["condition", "accuracy", f"against {baseline}"], rows


def conclude(values: dict[str, list[float]], baseline: str, knn: dict[str, float]) -> list[str]:
    """The finding in words; no gain means that the interval contains 0."""
    differences = {n: paired_difference(v, values[baseline]) for n, v in values.items() if n != baseline}
    sentences = [
        f"kNN (k = 20, all training labels): {100 * knn['untrained']:.1f} % untrained, {100 * knn['pretrained']:.1f} % pretrained."
    ]
    if differences:
        best = max(differences, key=lambda name: differences[name].mean)
        sentences.append(f"{best} against {baseline}: {_verdict(differences[best])}")
    return sentences


def _verdict(difference: Interval) -> str:
    points = f"{difference.percent(signed=True)} points (95 % interval, paired by seed)"
    if difference.half == float("inf"):
        return f"{points[:-38]} points with one seed, which says nothing of chance."
    if difference.low > 0:
        return f"{points}: a gain."
    return f"{points}: no gain beyond chance." if difference.mean + difference.half > 0 else f"{points}: a loss."


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def main() -> None:
    """The command line."""
    run_command("study", StudyConfig, study)


if __name__ == "__main__":
    main()
