"""Stage two, stopped anywhere and continued, equals the run that was not stopped: bit for bit, in every regime."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.downstream.regime import train
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.engine.loop import _log
from ssl_pipeline.finetune import finetune
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.logging.jsonl import TRAINING_STEP, read_metrics
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.pretrain_config import PretrainConfig
from tests.forks import Forked
from tests.runs import same_bytes, tiny_finetune, tiny_pretrain, tiny_words
from tests.shapes import mask_folder

SHORT = [
    "seeds=2", "regime.length=6 steps", "regime.min_steps=0", "regime.batch_size=16", "regime.probe.length=4 steps",
    "regime.probe.min_steps=0", "save_every=2 steps", "labels.validation=0.2",
]  # fmt: skip


class StoppedError(Exception):
    """The plug was pulled."""


def stopped_by_a_signal(words: list[str], run: Path) -> tuple[int, str]:
    """The exit code and the words of a process that is told to stop when its second checkpoint of all layers is there."""
    log = run.with_suffix(".log")
    process = Forked(["-m", "ssl_pipeline.cli", "finetune", *words], log)
    kept, until = run / "checkpoints" / "seed-0" / "all_layers", time.monotonic() + 120
    while len(list(kept.glob("step-*.pt"))) < 2:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    return process.wait(20), log.read_text()


@contextmanager
def stopped_after(saves: int, patched: pytest.MonkeyPatch) -> Iterator[None]:
    """The run ends right after a number of checkpoints."""
    save, left = Checkpoints.save, iter(range(saves - 1, -1, -1))

    def save_and_stop(self: Checkpoints, done: int, state: dict[str, Any]) -> None:
        save(self, done, state)
        if next(left) == 0:
            raise StoppedError

    with patched.context() as here:
        here.setattr(Checkpoints, "save", save_and_stop)
        with pytest.raises(StoppedError):
            yield


def check_same(whole: Path, parts: Path, steps: int) -> None:
    assert same_bytes(whole, parts, ["model.safetensors", "results.json"])
    lines = [[{**line, "time": 0} for line in read_metrics(folder)] for folder in (whole, parts)]
    of_seeds = [line["step"] for line in lines[0] if TRAINING_STEP not in line]
    assert of_seeds == [0, 1]
    assert lines[0] == lines[1]  # each step of a training is told once
    trained = [line[TRAINING_STEP] for line in lines[0] if TRAINING_STEP in line]
    assert trained == list(range(1, steps + 1))
    assert not (parts / "checkpoints").exists()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(tiny_pretrain(tmp_path_factory.mktemp("one") / "run", "steps=2"))


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mask_folder(tmp_path_factory.mktemp("scenes") / "all", 24, height=16, width=20)


@pytest.fixture(scope="module")
def mask_encoder(masks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [
        "tracking=off", "num_workers=0", "data=mask_folder", f"data.path={masks}", "transform=small", "transform.size=16", "backbone.width=4",
        "batch_size=16", "steps=1", "pretext.hidden_width=16", "pretext.projection_width=16", "evaluate_every=0 steps",
    ]  # fmt: skip
    return pretrain(load("pretrain", PretrainConfig, [*words, f"output={tmp_path_factory.mktemp('one') / 'run'}"]))


@pytest.mark.parametrize(
    ("words", "saves"), [
        (["regime=lp_ft"], 1), (["regime=lp_ft"], 5), (["regime=lp_ft", "labels.validation=auto"], 4), (["regime=end_to_end"], 2), (["regime=scratch"], 3),
        (["regime=lp_ft", "unlabeled=consistency", "unlabeled.confidence=0.2"], 2),
    ],
)  # fmt: skip  # a loop of 6 steps saves 3 times: stopped in the first seed's middle, in the second's, and between the two
def test_a_classifier(
    words: list[str], saves: int, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str, *more: str) -> FinetuneConfig:
        return tiny_finetune(encoder, tmp_path / name, *SHORT, *words, *more)

    whole = finetune(config("whole")).folder
    with stopped_after(saves, monkeypatch):
        finetune(config("parts"))
    check_same(whole, finetune(config("parts", "resume=auto")).folder, 12)


def test_a_step_beyond_the_last_checkpoint_is_told_once(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["regime=end_to_end", *SHORT, "save_every=4 steps"]
    whole = finetune(tiny_finetune(encoder, tmp_path / "whole", *words)).folder

    def tell_and_stop(callbacks: Any, done: int, *rest: Any) -> None:
        _log(callbacks, done, *rest)
        if done == 5:
            raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr("ssl_pipeline.engine.loop._log", tell_and_stop)
        with pytest.raises(StoppedError):
            finetune(tiny_finetune(encoder, tmp_path / "parts", *words))
    check_same(whole, finetune(tiny_finetune(encoder, tmp_path / "parts", *words, "resume=auto")).folder, 12)


def test_seeds_of_two_configurations_are_not_mixed(encoder: Path, tmp_path: Path) -> None:
    words = ["regime=frozen", "labels.per_class=3"]
    run = tmp_path / "run"
    finetune(tiny_finetune(encoder, run, "regime=frozen", "labels.per_class=1", "seeds=1"))
    changed = finetune(tiny_finetune(encoder, run, *words, "seeds=2", "resume=changed"))
    fresh = finetune(tiny_finetune(encoder, tmp_path / "fresh", *words, "seeds=2"))
    assert changed.figures == fresh.figures
    assert same_bytes(changed.folder, fresh.folder, ["model.safetensors", "results.json"])
    before = (run / "model.safetensors").stat().st_mtime_ns
    more = finetune(tiny_finetune(encoder, run, *words, "seeds=3", "resume=auto"))  # more seeds are no change
    assert more.figures[:2] == fresh.figures
    assert len(more.figures) == 3
    assert (run / "model.safetensors").stat().st_mtime_ns == before


def test_a_signal_in_the_middle_of_lp_ft(encoder: Path, tmp_path: Path) -> None:
    words = ["regime=lp_ft", *SHORT, "seeds=1", "regime.length=80 steps", "save_every=1 steps"]
    whole = finetune(tiny_finetune(encoder, tmp_path / "whole", *words)).folder
    parts = tmp_path / "parts"
    code, said = stopped_by_a_signal([*tiny_words(encoder, parts), *words], parts)
    assert code == 75, said
    assert "of 80: its state is saved, `resume=auto` continues from it" in said
    assert (parts / "requeue").is_file()
    assert not (parts / "model.safetensors").exists()
    finetune(tiny_finetune(encoder, parts, *words, "resume=auto"))
    assert not (parts / "requeue").exists()
    assert same_bytes(whole, parts, ["model.safetensors", "results.json"])


def test_a_frozen_encoders_seeds_are_not_done_twice(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str, *more: str) -> FinetuneConfig:
        return tiny_finetune(encoder, tmp_path / name, "regime=frozen", "seeds=2", *more)

    whole = finetune(config("whole")).folder
    seeds = []

    def noted(stops_at: int | None) -> Callable[..., None]:
        def train_unless(regime: Any, task: Any, context: Any) -> None:
            if context.seed == stops_at:
                raise StoppedError
            seeds.append(context.seed)
            train(regime, task, context)

        return train_unless

    monkeypatch.setattr("ssl_pipeline.downstream.plan.train", noted(1))
    with pytest.raises(StoppedError):
        finetune(config("parts"))
    monkeypatch.setattr("ssl_pipeline.downstream.plan.train", noted(None))
    parts = finetune(config("parts", "resume=auto")).folder
    assert seeds == [0, 1]
    check_same(whole, parts, 0)
    finetune(config("parts", "resume=auto"))
    assert seeds == [0, 1]
    check_same(whole, parts, 0)


@pytest.mark.parametrize("regime", ["frozen", "lp_ft", "end_to_end", "scratch"])
def test_a_segmentation(
    regime: str, masks: Path, mask_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["tracking=off", "num_workers=0", "data=mask_folder", f"data.path={masks}", "downstream=segmentation"]

    def config(name: str, *more: str) -> FinetuneConfig:
        more = (*more, f"regime={regime}", f"encoder={mask_encoder}", f"output={tmp_path / name}")
        return load("finetune", FinetuneConfig, [*words, *SHORT, *more])

    whole = finetune(config("whole")).folder
    # Loops save twice (the probe's) and three times; each run is stopped in both of its kinds.
    for saves in {"frozen": [1, 2], "lp_ft": [1, 2, 4], "end_to_end": [4], "scratch": [2]}[regime]:
        with stopped_after(saves, monkeypatch):
            finetune(config("parts", "resume=auto"))
    check_same(whole, finetune(config("parts", "resume=auto")).folder, {"frozen": 8, "lp_ft": 20}.get(regime, 12))


def test_another_encoder_is_noticed(encoder: Path, tmp_path: Path) -> None:
    place = tmp_path / "encoder"
    shutil.copytree(encoder, place)
    config = tiny_finetune(place, tmp_path / "run", "regime=frozen", "resume=auto")
    finetune(config)
    weights = load_file(place / "encoder.safetensors")
    weights["backbone.trunk.conv1.weight"][0, 0, 0, 0] += 1
    save_file(weights, place / "encoder.safetensors")
    with pytest.raises(ConfigError, match="`encoder` is not what the run was started on"):
        finetune(config)
