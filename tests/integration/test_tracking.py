"""Real runs of both stages with all mirrors: what they hold is read back, and what kills them harms no run."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.evaluation.plots import ImageLogger
from ssl_pipeline.finetune import finetune
from ssl_pipeline.logging.jsonl import GROUPS, TRAINING_STEP, JsonlLogger, read_metrics
from ssl_pipeline.logging.logger import AsyncLogger, Logger, LoggerCollection, TrackingConfig, open_loggers
from ssl_pipeline.logging.run import RunFolder, open_run
from ssl_pipeline.models.encoder import load_encoder
from ssl_pipeline.pretrain import pretrain
from tests.runs import tiny_finetune, tiny_pretrain
from tests.wandb_file import history, records

ROOT = Path(__file__).parents[2]
SECRET = "hf_plantedplantedplanted"


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A machine without a key, without W&B's server, and with a secret in its environment."""
    import wandb

    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"):
            patch.setenv(name, str(home / name))
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        patch.setenv("HF_TOKEN", SECRET)
        wandb.teardown()
        yield
        wandb.teardown()


@pytest.fixture(scope="module")
def runs(nowhere: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    import wandb

    folder = tmp_path_factory.mktemp("runs")
    tracked = ["tracking=tensorboard", "tracking.name=auto", "tracking.group=pair", "tracking.log_images=true"]
    one = pretrain(tiny_pretrain(folder / "one", *tracked, "steps=4", "evaluate_every=2 steps"))
    short = [
        "regime=end_to_end",
        "regime.length=3 steps",
        "regime.min_steps=0",
        "regime.batch_size=20",
        "seeds=2",
        "labels.validation=0.2",
    ]
    mirrored = ["tracking=auto", "tracking.loggers=[tensorboard]", "tracking.log_images=true"]
    two = finetune(tiny_finetune(one, folder / "two", *mirrored, *short)).folder
    wandb.teardown()  # as at a process's end: its service writes the last lines a moment after `finish`
    return one, two


def wandb_file(run: Path) -> Path:
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    return file


def pictured(lines: list[dict[str, Any]]) -> set[tuple[int, str]]:
    return {(line["step"], name) for line in lines for name in line if name.startswith("media/")}


def test_wandb_holds_what_the_log_holds(runs: tuple[Path, Path]) -> None:
    for run, axis in zip(runs, ("step", "seed"), strict=True):
        rows = history(wandb_file(run))
        kept = [
            {"step": row[axis]} | {k: float(v) for k, v in row.items() if "/" in k and "media/" not in k}
            for row in rows
        ]
        lines = [
            {k: v for k, v in line.items() if k == "step" or (k != "time" and "media/" not in k)}
            for line in read_metrics(run)
        ]
        assert [row for row in kept if len(row) > 1] == [line for line in lines if len(line) > 1]
        axes = {r.metric.glob_name: r.metric.step_metric for r in records(wandb_file(run)) if r.HasField("metric")}
        by_name = {f"{group}/*": axis for group in GROUPS} | {"finetune/*": TRAINING_STEP}
        assert {glob: by for glob, by in axes.items() if glob} == by_name


def test_pictures_are_few_and_the_same_in_folder_log_and_wandb(runs: tuple[Path, Path]) -> None:
    assert pictured(read_metrics(runs[0])) >= {
        (0, "media/views"), (0, "media/neighbors"), (0, "media/embedding_map"), (4, "media/neighbors"),
    }  # fmt: skip
    assert pictured(read_metrics(runs[1])) == {(0, "media/confusion")}
    for run in runs:
        files = [run / v for line in read_metrics(run) for k, v in line.items() if k.startswith("media/")]
        sent = {row[k] for row in history(wandb_file(run)) for k in row if k.endswith(".path")}
        assert sorted(f.read_bytes() for f in files) == sorted(
            (wandb_file(run).parent / "files" / p).read_bytes() for p in sent
        )
        for file in files:
            with Image.open(file) as picture:
                picture.load()
                assert len(picture.convert("L").getcolors() or []) > 3  # not one blank sheet


def test_stage_two_is_linked_to_stage_ones_artifact(runs: tuple[Path, Path]) -> None:
    made, used = ([r.artifact for r in records(wandb_file(run)) if r.HasField("artifact")] for run in runs)
    identity = (runs[0] / "wandb_id").read_text()
    assert [a.name for a in (*made, *used)] == [f"encoder-{identity}"] * 2
    assert [a.use_after_commit for a in (*made, *used)] == [False, True]
    assert made[0].digest == used[0].digest  # by which W&B knows that both are one version
    (config,) = [r.config for r in records(wandb_file(runs[1])) if r.HasField("config")]
    assert json.loads(config.update[0].value_json)["wandb_id"] == identity


def test_config_is_kept_and_no_secret(runs: tuple[Path, Path]) -> None:
    (start,) = [r.run for r in records(wandb_file(runs[0])) if r.HasField("run")]
    assert start.run_group == "pair"
    config = {item.key: json.loads(item.value_json) for item in start.config.update}
    assert config["batch_size"] == 32
    for run in runs:
        for file in run.rglob("*"):
            assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


def stopped(run: RunFolder, tracking: TrackingConfig) -> None:
    with open_loggers(run, "pretrain", {}, tracking, 1) as trackers:
        trackers.log(2, {"pretrain/loss": 0.5})
        raise KeyboardInterrupt


def test_a_secret_in_the_config_reaches_no_file(nowhere: None, tmp_path: Path) -> None:
    import wandb

    config = {"data": {"access_token": SECRET}, "seed": 1}
    tracking = TrackingConfig(loggers=("tensorboard",))
    with open_run(str(tmp_path / "a"), "pretrain", "no", config) as run:
        with open_loggers(run, "pretrain", config, tracking, 0) as trackers:
            trackers.log(1, {"pretrain/loss": 1.0})
            trackers.alert(1, "collapse", "look")
        wandb.teardown()
        found = [file for file in run.path.rglob("*") if file.is_file()]
        assert not [file for file in found if SECRET.encode() in file.read_bytes()]
        assert {r.alert.title for r in records(wandb_file(run.path)) if r.HasField("alert")} == {"collapse"}
        assert read_metrics(run.path)[1]["alert"] == "collapse"
        # Continued, it is the same run of W&B's: offline in a second folder, which `wandb sync` sends to the first one's.
        with pytest.raises(KeyboardInterrupt):
            stopped(run, tracking)
        wandb.teardown()
        codes = [
            r.exit.exit_code for f in run.path.glob("wandb/offline*/*.wandb") for r in records(f) if r.HasField("exit")
        ]
        assert sorted(codes) == [0, 1]  # the one that was stopped is shown as such
        starts = [
            r.run.run_id for f in run.path.glob("wandb/offline*/*.wandb") for r in records(f) if r.HasField("run")
        ]
        assert set(starts) == {(run.path / "wandb_id").read_text()}


def test_tensorboard_holds_what_the_log_holds(runs: tuple[Path, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs[0] / "tensorboard"))
    events.Reload()
    lines = read_metrics(runs[0])
    for name in ("pretrain/loss", "eval/knn", "temperature/tau", "system/images_per_s"):
        logged = {line["step"]: line[name] for line in lines if name in line}
        assert {e.step: e.value for e in events.Scalars(name)} == pytest.approx(logged, rel=1e-6)
    assert {(e.step, name) for name in events.Tags()["images"] for e in events.Images(name)} == pictured(lines)
    events = EventAccumulator(str(runs[1] / "tensorboard"))
    events.Reload()
    losses = {line[TRAINING_STEP]: line["finetune/loss"] for line in read_metrics(runs[1]) if TRAINING_STEP in line}
    assert list(losses) == list(range(1, 7))  # two seeds of three steps, one after another
    assert {e.step: e.value for e in events.Scalars("finetune/loss")} == pytest.approx(losses, rel=1e-6)


def test_every_logged_name_stands_in_the_docs(runs: tuple[Path, Path]) -> None:
    rows = (ROOT / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `([a-z_]+/[a-z_0-9]+)`", rows, re.MULTILINE))
    logged = {name for run in runs for line in read_metrics(run) for name in line} - {"step", "time"}
    assert logged <= documented
    assert {name.partition("/")[0] for name in documented} == set(GROUPS)
    assert documented - logged == {
        "system/bad_files", "pretrain/queue", "pretrain/prototypes_used", "pretrain/nonfinite_steps", "pretrain/skipped_steps",
        "test/accuracy", "test/class_mean_accuracy", "study/pretrained_lp_ft", "media/label_efficiency",
    }  # fmt: skip


# What kills a mirror


def test_a_server_that_never_answers_harms_nothing(
    nowhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts by its backlog, and says nothing
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_MODE", "online")
        wandb.teardown()
        tracking = TrackingConfig(init_timeout=1.5, finish_timeout=20)
        with open_run(str(tmp_path / "a"), "pretrain", "no", {}) as run:
            began = time.monotonic()
            with open_loggers(run, "pretrain", {}, tracking, 0) as trackers:
                trackers.log(1, {"pretrain/loss": 1.0})
                assert time.monotonic() - began < 1.0  # nobody waited for the server
        wandb.teardown()
        assert [row["pretrain/loss"] for row in history(wandb_file(run.path))] == [1.0]
    assert read_metrics(run.path)[0]["pretrain/loss"] == 1.0
    assert next(r.message for r in caplog.records if r.name == "ssl_pipeline").startswith("W&B can't go online")
    assert len([r for r in caplog.records if r.name == "ssl_pipeline"]) == 1


class Stuck(Logger):
    """A mirror that hangs until it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        del step, metrics
        self.let_go.wait()

    def finish(self, failed: bool) -> None:
        self.let_go.wait()


@pytest.mark.parametrize(("room", "why"), [(3, "is 3 calls behind"), (100, "was not done 0.2 s after the run's end")])
def test_a_mirror_that_hangs_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, room: int, why: str
) -> None:
    stuck = Stuck()
    began = time.monotonic()
    with LoggerCollection(
        JsonlLogger(tmp_path / "metrics.jsonl"), [AsyncLogger("W&B", lambda: stuck, 0.2, room)]
    ) as trackers:
        for step in range(20):
            trackers.log(step, {"pretrain/loss": 1.0})
    assert time.monotonic() - began < 5
    stuck.let_go.set()
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(20))
    assert [r.message for r in caplog.records] == [f"W&B {why} and is left out; metrics.jsonl holds everything"]


def test_neither_dead_mirrors_nor_pictures_move_a_weight(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ssl_pipeline.logging.logger._open_wandb", lambda *_: 1 / 0)
    words = ["tracking=auto", "tracking.log_images=false", "steps=4", "evaluate_every=2 steps"]
    broken = pretrain(tiny_pretrain(tmp_path / "a", *words))
    first, second = load_encoder(runs[0])[0].state_dict(), load_encoder(broken)[0].state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING and r.name == "ssl_pipeline"] == [
        "W&B failed (division by zero) and is left out; metrics.jsonl holds everything"
    ]
    assert not pictured(read_metrics(broken))


def test_a_picture_that_fails_harms_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with LoggerCollection(JsonlLogger(tmp_path / "metrics.jsonl"), [], draws=True) as trackers:
        gallery = ImageLogger(trackers)
        for _ in range(2):
            gallery.confusion(0, torch.zeros(0, 0), ())
    assert len(caplog.records) == 1
    assert "no more pictures are drawn: confusion failed" in caplog.records[0].message


@pytest.mark.parametrize("name", ["tensorbord", "wandb"])
def test_a_mirror_that_nobody_knows_is_told(tmp_path: Path, name: str) -> None:
    with open_run(str(tmp_path / "a"), "pretrain", "no", {}) as run, pytest.raises(ConfigError, match="is none of"):
        open_loggers(run, "pretrain", {}, TrackingConfig(name="off", loggers=(name,)), 0)
