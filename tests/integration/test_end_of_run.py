"""What is there when a run ends: an encoder whatever fails, finite figures, and the words that say what they are worth."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load, run_command
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.engine import memory
from ssl_pipeline.evaluation.online import OnlineEvaluation, without_gain
from ssl_pipeline.finetune import finetune
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.logging.jsonl import read_metrics
from ssl_pipeline.models.encoder import load_encoder, read
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.pretrain_config import PretrainConfig
from ssl_pipeline.report.read import read_runs
from ssl_pipeline.report.summary import summary
from tests.pictures import color_folder
from tests.runs import TINY, tiny_finetune, tiny_pretrain

FEW = [word for word in TINY if not word.startswith(("data.", "batch."))] + [
    "data=folder",
    "num_workers=0",
    "batch_size=4",
]


def test_a_folder_of_few_images_ends_with_an_encoder_and_final_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of twelve images one is val: no pair to measure uniformity of. The command is the one of a launcher's process, without a verb."""
    photos = color_folder(tmp_path / "my photos", 4)
    words = [*FEW, f"data.path='{photos}'", "steps=2", f"output={tmp_path / 'run'}", "batch_size=256"]
    monkeypatch.setattr(sys, "argv", ["launch/pretrain", *words])
    run_command("pretrain", PretrainConfig, pretrain)
    run = tmp_path / "run"
    last = [line for line in read_metrics(run) if "eval/knn" in line]
    assert [line["step"] for line in last] == [2]  # `evaluate_every=0 steps` is the end only, not never
    assert all(math.isfinite(value) for value in last[0].values())
    figures = load_encoder(run)[1].figures
    assert figures == {name: value for name, value in last[0].items() if name.startswith("eval/")}
    assert "eval/uniformity" in figures
    command = json.loads((run / "run.json").read_text())["starts"][0]["command"]
    assert shlex.split(command) == ["ssl-pipeline", "pretrain", *words]
    said = capsys.readouterr().out
    size = load("pretrain", PretrainConfig, [*words, "resume=auto"]).data.open_pool()
    assert size is not None
    assert f"batch_size={len(size)} instead of 256" in " ".join(said.split())
    assert OmegaConf.load(run / "config.yaml").batch_size == len(size)
    pretrain(load("pretrain", PretrainConfig, [*words, "resume=auto"]))  # the same words are the same run
    assert "untrained" in said
    assert "Pretraining moved nothing" in said  # of one image nothing can be told
    assert "kNN accuracy on val" in " ".join(summary(read_runs([run])[0]))


def test_an_evaluation_that_fails_at_the_end_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate, calls = OnlineEvaluation.__call__, iter(range(9))

    def failing(self: OnlineEvaluation, encoder: object) -> dict[str, float]:
        if next(calls):
            raise RuntimeError("no figure today")
        return evaluate(self, encoder)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(OnlineEvaluation, "__call__", failing)
        run = pretrain(tiny_pretrain(tmp_path / "run", "steps=2", "evaluate_every=1 steps"))
    assert "the evaluation after step 1 failed (RuntimeError: no figure today). Training goes on." in caplog.text
    assert "step 2 failed (RuntimeError: no figure today). The encoder is saved" in caplog.text
    assert load_encoder(run)[1].figures == {}
    before = (run / "encoder.safetensors").read_bytes()
    again = pretrain(tiny_pretrain(tmp_path / "run", "steps=2", "evaluate_every=1 steps", "resume=auto"))
    assert "eval/knn" in load_encoder(again)[1].figures
    assert (again / "encoder.safetensors").read_bytes() == before


def test_stage_two_without_the_memory_for_a_step_is_refused_before_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: memory.Memory(1.0, 1.0))
    words = ["tracking=off", "regime=scratch", "size=12", "backbone.width=4", "split=val", "data.val=4000"]
    with pytest.raises(
        ConfigError, match=r"needs about .* lower `regime\.batch_size` \(it is 64 a process\) or `size`"
    ):
        finetune(load("finetune", FinetuneConfig, [*words, f"output={tmp_path / 'two'}"]))
    with pytest.raises(ConfigError, match=r"needs about .* lower `batch_size`"):
        pretrain(tiny_pretrain(tmp_path / "one"))
    assert not list(tmp_path.iterdir())


def test_a_model_that_can_not_be_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage_one = pretrain(tiny_pretrain(tmp_path / "one", "steps=1"))
    words = ["regime=scratch", "regime.length=2 steps", "regime.min_steps=0", "labels.validation=0"]

    def unmeasured(*_: object) -> dict[str, float]:
        raise KeyError("accuracy")

    with monkeypatch.context() as patched:
        patched.setattr(Classification, "evaluate_features", unmeasured)
        with pytest.raises(KeyError, match="accuracy"):
            finetune(tiny_finetune(stage_one, tmp_path / "two", *words))
    card, kept = read(tmp_path / "two", "model")
    assert card.figures == {}
    assert card.config["init"] == "random"  # `regime=scratch` alone says that nothing was pretrained
    finetune(tiny_finetune(stage_one, tmp_path / "two", *words, "resume=auto"))
    card, again = read(tmp_path / "two", "model")
    assert "accuracy" in card.figures
    assert all(kept[name].equal(again[name]) for name in kept)
    frozen = finetune(tiny_finetune(stage_one, tmp_path / "three", "regime=frozen")).folder
    assert read(frozen, "model")[0].config["init"] == "pretrained"


@pytest.mark.parametrize(
    ("before", "after", "images", "told"), [
        (0.5, 0.9, 100, None), (0.5, 0.55, 100, "moved nothing"), (0.5, 0.45, 100, "moved nothing"), (0.5, 0.5, 100, "moved nothing"),
        (0.9, 0.5, 100, "worse"), (0.5, 0.55, 10_000, None), (1.0, 1.0, 1, "moved nothing"), (0.5, 0.6, 0, None), (None, 0.6, 10, None),
    ],
)  # fmt: skip
def test_no_gain_beyond_chance_is_said(before: float | None, after: float, images: int, told: str | None) -> None:
    untrained = {} if before is None else {"eval/knn": before}
    said = without_gain(untrained, {"eval/knn": after}, images)
    assert (said is None) == (told is None)
    assert told is None or (said is not None and told in said and "two standard errors" in said)


@pytest.mark.parametrize(
    ("images", "size", "micro", "processes", "expected"), [
        (100, 256, None, 1, (100, None)), (101, 256, None, 4, (100, None)), (100, 256, 16, 2, (96, 16)), (20, 256, 64, 2, (20, None)),
        (100, 64, 16, 2, (64, 16)), (5, 256, None, 2, (4, None)),
    ],
)  # fmt: skip
def test_the_batch_is_the_largest_that_the_images_make(
    images: int, size: int, micro: int | None, processes: int, expected: tuple[int, int | None]
) -> None:
    source = ArrayDataset("few", torch.zeros(images, 1, 8, 8, dtype=torch.uint8))
    words = [f"batch_size={size}", f"micro_batch_size={'null' if micro is None else micro}", "optim.warmup=0 steps"]
    config, notes = load("pretrain", PretrainConfig, [*words]).fit_batch(source, processes)
    assert (config.batch_size, config.micro_batch_size) == expected
    assert bool(notes) == (images < size)
    assert not notes or "has only" in notes[0]
    config.check(source, processes)


def test_too_few_images_for_the_processes_are_told() -> None:
    source = ArrayDataset("few", torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
    config, notes = load("pretrain", PretrainConfig, []).fit_batch(source, 2)
    assert notes == []
    with pytest.raises(ConfigError, match="has only 3 images to train on, and each of 2"):
        config.check(source, 2)
