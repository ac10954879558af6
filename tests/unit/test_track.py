"""A run's folder is its own, the log is whole, and no mirror can stop a run."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.config.files import atomic_write_text
from ssl_pipeline.logging.jsonl import JsonlLogger, read_metrics, seconds_before
from ssl_pipeline.logging.logger import AsyncLogger, Logger, LoggerCollection, TrackingConfig, open_loggers
from ssl_pipeline.logging.progress import Progress, print_table
from ssl_pipeline.logging.redaction import redact, redact_command
from ssl_pipeline.logging.run import RunFolder, open_run, versions, write_json
from ssl_pipeline.logging.wandb import open_wandb
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.pretrain_config import PretrainConfig
from tests.runs import tiny_pretrain

CONFIG: dict[str, Any] = {
    "seed": 0,
    "output": None,
    "optim": {"rate": 1e-5, "betas": [0.9, 0.999]},
    "tracking": {"name": "off"},
}
OFF = TrackingConfig(name="off")


def run_in(folder: Path, resume: Any = "no", config: dict[str, Any] | None = None) -> RunFolder:
    return open_run(str(folder), "pretrain", resume, config or CONFIG)


# The folder


def test_runs_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "pretrain-009").mkdir()
    (tmp_path / "pretrain-notes").mkdir()
    names = [open_run(None, stage, "no", CONFIG, tmp_path).path.name for stage in ("pretrain", "pretrain", "finetune")]
    assert names == ["pretrain-010", "pretrain-011", "finetune-001"]


def test_second_run_is_refused(tmp_path: Path) -> None:
    run_in(tmp_path / "a").close()
    with pytest.raises(
        ConfigError, match=r"holds a run: choose another `output=FOLDER`, or continue it by `resume=auto`"
    ):
        run_in(tmp_path / "a")


@pytest.mark.parametrize("resume", ["no", "auto"])
def test_a_folder_of_other_things_is_left_as_it_was(tmp_path: Path, resume: str) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        run_in(tmp_path, resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_resume_continues_the_same_run(tmp_path: Path) -> None:
    with run_in(tmp_path / "a", "auto") as run:
        assert not run.resumed
    moved = CONFIG | {"output": "elsewhere", "resume": "auto", "tracking": {"name": "wandb"}, "num_workers": 3}
    with run_in(tmp_path / "a", "auto", moved) as run:
        assert run.resumed
    starts = json.loads((run.path / "run.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[0].keys() == {"started", "command", "commit", "threads", "device", "versions", "data"}
    assert starts[1]["changed"] == []


def test_resume_of_another_run_names_what_differs(tmp_path: Path) -> None:
    run_in(tmp_path / "a").close()
    before = (tmp_path / "a/config.yaml").read_text()
    other = CONFIG | {"optim": {"rate": 0.5, "betas": [0.9, 0.999], "grad_clip_norm": 1.0}}
    with pytest.raises(ConfigError) as error:
        run_in(tmp_path / "a", "auto", other)
    assert error.value.problems[:2] == [
        "`optim.grad_clip_norm` was 'not there' and is now 1.0.",
        "`optim.rate` was 1e-05 and is now 0.5.",
    ]
    assert (tmp_path / "a/config.yaml").read_text() == before


def test_changes_need_a_word_and_are_kept_note_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def opened(resume: Any, seed: int, train: str) -> None:
        open_run(str(tmp_path / "a"), "pretrain", resume, CONFIG | {"seed": seed}, data={"train": train}).close()

    opened("changed", 0, "a1")  # a word too much does no harm
    with pytest.raises(
        ConfigError,
        match=r"`seed` was 0 and is now 1\.\n`train` is not what the run was started on.*\n.*resume=changed",
    ):
        opened("auto", 1, "b2")
    opened("changed", 1, "b2")
    opened("auto", 1, "b2")  # the word is given once
    starts = json.loads((tmp_path / "a/run.json").read_text())["starts"]
    assert [len(start.get("changed", ())) for start in starts] == [0, 2, 0]
    assert "`seed` was 0 and is now 1" in caplog.text


def test_a_kill_between_the_two_files_of_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(seed: int, resume: Any = "auto") -> None:
        run_in(tmp_path / "a", resume, CONFIG | {"seed": seed}).close()

    def killed(seed: int, resume: Any = "auto") -> None:
        def dies(path: Path, text: str) -> None:
            atomic_write_text(path, text)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr("ssl_pipeline.logging.run.atomic_write_text", dies)
            with pytest.raises(KeyboardInterrupt):
                opened(seed, resume)

    killed(0)
    opened(0)
    killed(1, "changed")
    with pytest.raises(ConfigError, match="`seed` was 0 and is now 1"):
        opened(1)
    opened(1, "changed")
    starts = json.loads((tmp_path / "a/run.json").read_text())["starts"]
    assert [len(start.get("changed", ())) for start in starts] == [0, 1, 1]


def test_other_threads_and_versions_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_in(tmp_path / "a").close()
    run_in(tmp_path / "a", "auto").close()
    assert not caplog.text
    monkeypatch.setattr("ssl_pipeline.logging.run.torch.get_num_threads", lambda: 3)
    monkeypatch.setattr("ssl_pipeline.logging.run.versions", lambda: versions() | {"torch": "9.9"})
    run_in(tmp_path / "a", "auto").close()
    assert "threads was 1 and is now 3: from here on the last bits may differ" in caplog.text
    assert "torch was" in caplog.text
    assert "numpy" not in caplog.text


def test_a_fork_does_not_inherit_the_lock(tmp_path: Path) -> None:
    """A run that was killed lets the next one in at once, though a worker of its outlives it."""
    run_in(tmp_path / "a").close()
    hold = (
        "import os, sys, time\nfrom pathlib import Path\nfrom ssl_pipeline.logging.lock import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1]))\nif os.fork() == 0:\n    time.sleep(60)\nprint('held', flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="in use by another process"):
            run_in(tmp_path / "a", "auto")
        other.kill()  # and not its worker
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        run_in(tmp_path / "a", "auto").close()
        os.killpg(other.pid, signal.SIGKILL)


def test_resume_after_a_kill_before_the_first_file(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.yaml.partial").write_text("seed:")
    with run_in(tmp_path, "auto") as run:
        assert not run.resumed


def test_resume_with_an_unreadable_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"config\.yaml can't be read"):
        run_in(tmp_path, "auto")


def test_resume_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match="which run"):
        open_run(None, "pretrain", "auto", CONFIG)


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_unwritable_place(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file.*can't be written"):
        run_in(tmp_path / below)
    with pytest.raises(ConfigError, match=r"file.*can't be written"):
        open_run(None, "pretrain", "no", CONFIG, tmp_path / below)


def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    run_in(tmp_path / "a").close()
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "a/.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="in use by another process"):
            run_in(tmp_path / "a", "auto")
        other.kill()
    run_in(tmp_path / "a", "auto").close()  # a lock ends with its process: nothing is to be cleaned up by hand


def test_one_process_can_not_open_a_folder_twice(tmp_path: Path) -> None:
    with run_in(tmp_path / "a"), pytest.raises(ConfigError, match="in use"):
        run_in(tmp_path / "a", "auto")


def test_no_secret_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", "a.api_key=hush1", "--token", "hush2", "seed=1"])
    run = run_in(tmp_path / "a", config=CONFIG | {"data": {"access_token": "hush3"}})
    written = "".join(path.read_text() for path in run.path.iterdir())
    assert "hush" not in written
    assert "seed=1" in written


def test_redact() -> None:
    tree = {
        "apiKey": "x",
        "WANDB_API_KEY": "x",
        "a": [{"db-password": ["x"]}],
        "tokens": 7,
        "monkey": "ape",
        "token": None,
    }
    hidden = "<redacted>"
    assert redact(tree) == {
        "apiKey": hidden, "WANDB_API_KEY": hidden, "a": [{"db-password": hidden}], "tokens": 7, "monkey": "ape", "token": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("+hub={url: h, token: abc, size: 3}", "+hub={url: h, token: <redacted>, size: 3}"),
        ("note=hf_abcdefghijkl", "note=<redacted>"),
        ("note=" + "0a" * 20, "note=<redacted>"),
        ("data.root=https://me:pw@host/x", "data.root=https://<redacted>@host/x"),
        ("data.root=/data/keys/token", "data.root=/data/keys/token"),
        ("data.path=https://h/a.tar?X-Amz-Signature=12ab&n=1", "data.path=https://h/a.tar?<redacted>&n=1"),
        ("data.path=https://h/a.tar?sig=12ab%3D", "data.path=https://h/a.tar?<redacted>"),
        ("neck.name=tokens", "neck.name=tokens"),
        ("encoder=runs/" + "0a" * 20 + "/encoder.safetensors", "encoder=runs/" + "0a" * 20 + "/encoder.safetensors"),
    ],
)
def test_redact_command(word: str, shown: str) -> None:
    assert redact_command([word]) == [shown]


def test_redact_looks_at_texts_too() -> None:
    tree = {"data": {"path": "https://me:pw@host/a.tar"}, "note": ["hf_abcdefghijkl", "runs/a"], "size": 3}
    assert redact(tree) == {
        "data": {"path": "https://<redacted>@host/a.tar"}, "note": ["<redacted>", "runs/a"], "size": 3,
    }  # fmt: skip


def test_versions() -> None:
    assert {"python", "torch", "torchvision", "lightly", "accelerate", "ssl-pipeline", "numpy", "pillow"} <= set(
        versions()
    )


# The log


def test_no_numbers_come_back_as_they_went(tmp_path: Path) -> None:
    log = JsonlLogger(tmp_path / "metrics.jsonl")
    log.log(3, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1, "e": "text"})
    for text in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (line,) = read_metrics(tmp_path)  # before it is closed: each line is there at once
    log.finish()
    assert math.isnan(line.pop("a"))
    del line["time"]
    assert line == {"step": 3, "b": math.inf, "c": -math.inf, "d": 0.1, "e": "text"}


def test_json_files_hold_no_nan(tmp_path: Path) -> None:
    tree = {"figures": [{"a": math.nan, "b": 0.5}], "half": math.inf, "names": ("ä", None, True, 3)}
    write_json(tmp_path / "x.json", tree)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found == {"figures": [{"a": "nan", "b": 0.5}], "half": "inf", "names": ["ä", None, True, 3]}


def test_a_continued_log_holds_each_step_once(tmp_path: Path) -> None:
    with run_in(tmp_path / "a") as run:
        trackers = open_loggers(run, "pretrain", CONFIG, OFF, 0)
        for step in range(6):
            trackers.log(step, {"loss": 1.0})
        trackers.finish()
        file = run.path / "metrics.jsonl"
        with file.open("a") as half:
            half.write('{"step": 6, "time": 17')  # killed here
        assert [line["step"] for line in read_metrics(file)] == list(range(6))
        with open_loggers(run, "pretrain", CONFIG, OFF, 3) as trackers:
            for step in range(4, 8):
                trackers.log(step, {"loss": 2.0})
        assert [(line["step"], line["loss"]) for line in read_metrics(file)] == [
            (0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0),
        ]  # fmt: skip
        with open_loggers(run, "pretrain", CONFIG, OFF, -1) as trackers:  # killed before the first checkpoint
            trackers.log(0, {"loss": 3.0})
        assert [line["loss"] for line in read_metrics(file)] == [3.0]


# Mirrors


class Broken(Logger):
    def __init__(self) -> None:
        self.heard = 0

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        del step, metrics
        self.heard += 1
        if self.heard == 2:
            raise ConnectionError("the server is gone")

    def alert(self, title: str, text: str) -> None:
        raise AssertionError("nothing was to be alerted of")

    def finish(self, failed: bool) -> None:
        raise AssertionError("a dropped mirror is not asked again")


def test_a_broken_mirror_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mirror = Broken()
    asynchronous = AsyncLogger("Broken", lambda: mirror, 5.0)
    with LoggerCollection(JsonlLogger(tmp_path / "metrics.jsonl"), [asynchronous]) as trackers:
        for step in range(5):
            trackers.log(step, {"loss": 1.0})
    assert mirror.heard == 2
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "Broken failed (the server is gone) and is left out; metrics.jsonl holds everything"
    ]


@pytest.fixture
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which nobody has heard of W&B, and without its server."""
    import wandb

    for name in (
        "WANDB_API_KEY",
        "WANDB_MODE",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_DIR",
        "WANDB_PROJECT",
        "WANDB_RUN_ID",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()
    yield
    wandb.teardown()


def track(run: RunFolder, tracking: TrackingConfig) -> None:
    with open_loggers(run, "pretrain", CONFIG | {"token": "hush"}, tracking, 0) as trackers:
        trackers.log(1, {"pretrain/loss": 1.0})
    assert [line["step"] for line in read_metrics(run.path)] == [1]


@pytest.mark.usefixtures("no_key")
def test_wandb_without_a_key_goes_offline(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import wandb

    with run_in(tmp_path / "a") as run:
        track(run, TrackingConfig())
        wandb.teardown()  # as at the end of a process: W&B's service writes its last lines a moment after `finish`
        identity = (run.path / "wandb_id").read_text()
        (offline,) = (run.path / "wandb").glob("offline-run-*")
        recorded = (offline / f"run-{identity}.wandb").read_bytes()
        assert b"pretrain/loss" in recorded
        assert b"hush" not in recorded
        track(run, TrackingConfig(name="wandb"))
        assert (run.path / "wandb_id").read_text() == identity
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("no_key")
def test_wandb_with_a_key_and_no_server_goes_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with run_in(tmp_path / "a") as run:
        track(run, TrackingConfig(init_timeout=1.0))
        assert list((run.path / "wandb").glob("offline-run-*"))
    warnings = [record.message for record in caplog.records if record.name == "ssl_pipeline"]
    assert len(warnings) == 1
    assert "can't go online" in warnings[0]


@pytest.mark.usefixtures("no_key")
@pytest.mark.parametrize(("mode", "folders"), [("disabled", 0), ("offline", 1), ("online", 1)])
def test_the_environment_chooses_the_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, folders: int
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with run_in(tmp_path / "a") as run:
        track(run, TrackingConfig())
        assert len(list((run.path / "wandb").glob("*run-*-*"))) == folders


@pytest.mark.usefixtures("no_key")
def test_wandbs_environment_holds_where_the_configuration_has_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []

    class Started:
        id = "chosen-by-the-agent"

        def define_metric(self, *_: object, **__: object) -> None: ...

    def init(**arguments: Any) -> Started:
        told.append(arguments)
        return Started()

    monkeypatch.setattr("wandb.init", init)
    environment = {
        "PROJECT": "p", "ENTITY": "e", "RUN_GROUP": "g", "TAGS": "a, b", "NAME": "n", "NOTES": "o", "RUN_ID": "r1",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wanted = {"project": "p", "entity": "e", "group": "g", "tags": ["a", "b"], "name": "n", "notes": "o", "id": "r1"}
    own = TrackingConfig(project="mine", entity="me", group="ours", tags=("c",))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    open_wandb(tmp_path / "a", "pretrain", {}, TrackingConfig())
    open_wandb(tmp_path / "a", "pretrain", {}, own)
    open_wandb(tmp_path / "b", "pretrain", {}, own)
    assert {name: told[0][name] for name in wanted} == wanted
    explicit = {"project": "mine", "entity": "me", "group": "ours", "tags": ["c"], "id": "chosen-by-the-agent"}
    assert {name: told[1][name] for name in explicit} == explicit  # which a continued run of a sweep goes on with
    assert told[2]["id"] not in ("r1", "chosen-by-the-agent")  # another folder is another run


@pytest.mark.parametrize(("text", "runs"), [("true", 0), ("1", 0), ("false", 1), ("", 1)])
def test_wandb_disabled_is_tracking_off(text: str, runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setenv("WANDB_DISABLED", text)
    monkeypatch.setattr("ssl_pipeline.logging.logger.AsyncLogger", lambda name, *_: opened.append(name))
    with run_in(tmp_path / "a") as run:
        trackers = open_loggers(run, "pretrain", CONFIG, TrackingConfig(name="wandb"), 0)
        trackers._loggers.clear()
        trackers.finish()
    assert len(opened) == runs


def test_wandb_that_does_not_import_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    with run_in(tmp_path / "a") as run:
        track(run, TrackingConfig())
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_off_does_not_touch_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "ssl_pipeline.logging.wandb", ModuleType("empty"))
    with run_in(tmp_path / "a") as run:
        track(run, OFF)
        assert not (run.path / "wandb_id").exists()
    assert not caplog.records


def test_other_processes_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        run_in(tmp_path / "a") as run,
        open_loggers(None, "pretrain", CONFIG, TrackingConfig(), 0) as silent,
    ):
        silent.log(1, {"loss": 1.0})
    open_loggers(None, "pretrain", CONFIG, TrackingConfig(), 0).log(1, {"loss": 1.0})
    assert not (run.path / "metrics.jsonl").exists()
    with Progress(2, enabled=False) as progress:
        progress.update(2, {"loss": 1.0})
        progress.say("psst")
    assert capsys.readouterr() == ("", "")


# What a person sees


def test_plain_lines_in_a_batch_system(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(40, start_step=10) as progress:
        for step in range(11, 41):
            figures = {
                "pretrain/loss": 4.3125,
                "pretrain/lr": 0.0012,
                "system/images_per_s": 1523.4,
                "eval/loss": 9.0,
            }
            progress.update(step, figures | ({"temperature/tau": 0.2, "eval/knn": 0.5} if step > 11 else {}))
        progress.say("done [in brackets]")
    first, last, said = capsys.readouterr().out.splitlines()
    assert first == "step 11/40  loss 4.312  lr 0.0012  1,523 img/s"
    assert last == "step 40/40  loss 4.312  lr 0.0012  τ 0.2  1,523 img/s  kNN 50.0%"
    assert said == "done [in brackets]"


def test_each_of_several_trainings_says_which_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, title="seed 0, probe") as progress:
        progress.update(2, {"finetune/loss": 1.5, "finetune/validation_accuracy": 0.25})
    assert capsys.readouterr().out == "seed 0, probe  step 2/2  loss 1.500  validation 25.0%\n"


@pytest.mark.parametrize("mode", ["plain", "quiet"])
def test_a_batch_system_gets_lines_or_nothing(mode: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, mode=mode) as progress:
        for step in (1, 2):
            progress.update(step, {"pretrain/loss": 4.0, "pretrain/epoch": step / 2, "system/data_wait": 0.1})
        progress.say_end({"eval/knn": 0.75}, {"eval/knn": 0.25})
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == (
        ["step 1/2  loss 4.000  epoch 0.5  wait 10%", "step 2/2  loss 4.000  epoch 1.0  wait 10%"] * (mode == "plain")
    )
    assert any("knn" in line and "0.75" in line for line in lines) == (mode == "plain")
    assert any("loss, last logged" in line for line in lines) == (mode == "plain")


def test_a_terminal_gets_one_bar_and_no_color_where_none_is_wanted() -> None:
    script = (
        "from ssl_pipeline.logging.progress import Progress\n"
        "with Progress(2) as bar:\n"
        "    bar.update(1, {'pretrain/loss': 4.0, 'eval/knn': 0.5})\n"
        "    bar.say('above the bar')\n"
        "    bar.update(2, {'pretrain/loss': 3.0})\n"
    )
    shown = {}
    for name, environment in {"color": {}, "none": {"NO_COLOR": "1"}}.items():
        shown[name] = in_terminal([sys.executable, "-c", script], environment)
        assert "2/2" in shown[name]
        assert "loss 3.000" in shown[name]
        assert "kNN 50.0%" in shown[name]
        assert "above the bar" in shown[name]
        assert "step 1/2" not in shown[name]
    colors = re.compile(r"\x1b\[[0-9;]*(?:3[0-7]|38;5)[0-9;]*m")
    assert colors.search(shown["color"])
    assert not colors.search(shown["none"])


def test_other_processes_tell_errors_alone() -> None:
    script = (
        "import logging, sys, warnings\n"
        "from ssl_pipeline.logging.progress import silence_other_ranks\n"
        "silence_other_ranks(sys.argv[1] == 'main')\n"
        "warnings.warn('a library warns')\n"
        "logging.getLogger('a.library').warning('and logs')\n"
        "logging.getLogger('a.library').error('and fails')\n"
    )
    told = {}
    for which in ("main", "other"):
        words = [sys.executable, "-c", script, which]
        told[which] = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    assert all(words in told["main"] for words in ("a library warns", "and logs", "and fails"))
    assert told["other"] == "and fails\n"


def in_terminal(words: list[str], environment: dict[str, str]) -> str:
    """What a program writes to a terminal of its own."""
    ours, theirs = pty.openpty()
    cleaned = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CI")}
    env = {**cleaned, "TERM": "xterm-256color", "COLUMNS": "120", **environment}
    with subprocess.Popen(words, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        parts = []
        while True:
            try:
                part = os.read(ours, 65_536)
            except OSError:  # Linux says so when the last writer has gone
                break
            if not part:
                break
            parts.append(part)
        assert process.wait() == 0
    os.close(ours)
    return b"".join(parts).decode()


def test_a_starving_model_is_told_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    for waits, told in (
        ([0.9, 0.1, 0.9, 0.9, 0.1], 0),  # workers start, evaluations end: no sign of hunger
        ([0.9, 0.3, 0.4, 0.1, 0.9, 0.9, 0.9], 1),
    ):
        with Progress(100) as progress:
            for step, wait in enumerate(waits):
                progress.update(step, {"system/data_wait": wait})
        assert capsys.readouterr().out.count("of the time of the last steps went into waiting for data") == told


def test_a_stopped_run_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(100) as progress:
        progress.update(1, {})
        progress.update(2, {"train/loss": math.nan})
    assert capsys.readouterr().out.splitlines()[-1] == "step 2/100  loss nan  0:00 left"


def test_a_run_moves_and_has_a_time_left_whenever_its_figures_come(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("ssl_pipeline.logging.progress.time.monotonic", lambda: now)
    with Progress(100, mode="plain") as progress:
        progress.moved(0)
        for step in range(1, 6):
            now = 4.0 * step
            progress.moved(step)
        progress.update(5, {"train/loss": 2.0})
    assert capsys.readouterr().out.splitlines() == ["step 3/100  6:28 left", "step 5/100  loss 2.000  6:20 left"]


def test_what_takes_long_without_steps_is_said_before_it_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("ssl_pipeline.logging.progress.time.monotonic", lambda: now)
    said = list[str]()

    def work(seconds: float) -> float:
        nonlocal now
        now += seconds
        said.append(capsys.readouterr().out)
        return seconds

    with Progress(0, mode="plain") as progress:
        measure = progress.announcing("measuring", work)
        assert [measure(seconds) for seconds in (3, 7, 70, 1)] == [3, 7, 70, 1]
    assert said == ["  measuring\n", "", "  measuring, about 0:07\n", "  measuring, about 1:10\n"]


def test_the_end_counts_all_starts_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = [datetime.datetime(2026, 1, day, tzinfo=datetime.UTC) for day in (1, 2, 3)]
    starts = [{"started": at.isoformat(timespec="seconds")} for at in began]
    (tmp_path / "run.json").write_text(json.dumps({"starts": starts}))
    assert seconds_before(tmp_path) == 0
    times = [began[0].timestamp() + 40, began[0].timestamp() + 100, began[1].timestamp() + 30, began[2].timestamp() + 9]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": 1, "time": t}) + "\n" for t in times))
    assert seconds_before(tmp_path) == 130
    with Progress(40, start_step=30, mode="plain", seconds_before=130) as progress:
        progress.update(40, {})
        progress.say_end({}, {})
    shown = [
        re.findall(r"[\w:]+", line)[-1]
        for line in capsys.readouterr().out.splitlines()
        if "steps" in line or "time" in line
    ]
    assert shown == ["40", "2:10"]


def test_no_tracking_draws_no_pictures() -> None:
    assert not load("pretrain", PretrainConfig, ["tracking=off"]).tracking.log_images
    assert load("pretrain", PretrainConfig, ["tracking=off", "tracking.log_images=true"]).tracking.log_images
    assert load("pretrain", PretrainConfig, ["tracking=tensorboard"]).tracking.log_images


def test_each_step_is_heard_of_whatever_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = list[int]()
    monkeypatch.setattr(Progress, "moved", lambda self, step: heard.append(step))
    pretrain(tiny_pretrain(tmp_path / "run", "log_every=100"))
    assert heard == [0, 1, 2, 3, 4]


def test_a_wide_table_stays_whole(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("title [x]", ["what", *("column" * 3 for _ in range(8))], [["[a]", *(f"{n}" * 20 for n in range(8))]])
    out = capsys.readouterr().out
    assert "title [x]" in out
    assert "[a]" in out
    assert "7" * 20 in out
