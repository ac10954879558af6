"""6 steps equal 3, a stop, and 3 more: bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.config.schema import names
from ssl_pipeline.data.loader import IndexedLoader
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.evaluation.online import OnlineEvaluation
from ssl_pipeline.logging.jsonl import read_metrics
from ssl_pipeline.models.encoder import load_encoder
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.pretrain_config import PretrainConfig
from tests.pictures import color_folder
from tests.runs import TINY, same_bytes, small_pretext, tiny_pretrain

LENGTH = ["steps=6", "save_every=3 steps"]


class StoppedError(Exception):
    """The plug was pulled."""


OF_TIME = ("time", "system/images_per_s", "system/data_wait")  # what no two runs have in common
OPTIONS = {
    "instance_discrimination": ["micro_batch_size=16"],
    "moco_v2": ["pretext.temperature.learned.min=0.05"],
    "swav": ["transform.local_views.count=2", "transform.local_views.size=8", "pretext.queue_start=3 steps"],
    "barlow_twins": ["optim=lars", "optim.warmup=1 steps"],
    "rotation": ["optim=sgd", "optim.warmup=1 steps"],
}


@pytest.mark.parametrize("name", names("pretext"))
def test_a_stopped_run_continues_to_the_same_bits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, optimizer, teacher, queue, bank, temperature and figures, of every pretext task."""
    monkeypatch.setattr(OnlineEvaluation, "__call__", lambda *_: {})

    def config(folder: str, *more: str) -> PretrainConfig:
        tiny = [word for word in TINY if not word.startswith("pretext.")]
        words = [*tiny, *LENGTH, *small_pretext(name), *OPTIONS.get(name, ()), f"output={tmp_path / folder}"]
        return load("pretrain", PretrainConfig, [*words, *more])

    whole = pretrain(config("whole"))
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, done: int, state: dict[str, Any]) -> None:
        save(self, done, state)
        raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", save_and_stop)
        with pytest.raises(StoppedError):
            pretrain(config("parts"))
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 4, "pretrain/loss": 7.0}\n{"st')  # killed in step 5
    parts = pretrain(config("parts", "resume=auto"))
    assert same_bytes(whole, parts, ["encoder.safetensors"])
    ends = [Checkpoints(folder / "checkpoints").load() for folder in (whole, parts)]
    assert ends[0] is not None
    assert ends[0]["done"] == 6
    assert ends[0]["optimizer"]["state"]
    assert flat(ends[0]).keys() == flat(ends[1]).keys()
    assert all(torch.equal(value, flat(ends[1])[key]) for key, value in flat(ends[0]).items())
    lines = [
        [{k: v for k, v in line.items() if k not in OF_TIME} for line in read_metrics(run)] for run in (whole, parts)
    ]
    assert [line["step"] for line in lines[0]] == list(range(1, 7))
    assert lines[0] == lines[1]


def flat(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors and numbers of nested containers."""
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {name: value for key, part in items for name, value in flat(part, f"{path}/{key}").items()}
    return {path: torch.as_tensor(tree)} if isinstance(tree, torch.Tensor | float | int) else {}


def test_a_stopped_run_measures_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    length = ["steps=5", "save_every=3 steps", "evaluate_every=2 steps"]
    whole = pretrain(tiny_pretrain(tmp_path / "whole", *length))
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, done: int, state: dict[str, Any]) -> None:
        save(self, done, state)
        raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", save_and_stop)
        with pytest.raises(StoppedError):
            pretrain(tiny_pretrain(tmp_path / "parts", *length))
    parts = pretrain(tiny_pretrain(tmp_path / "parts", *length, "resume=auto"))
    figures = [
        [{k: v for k, v in line.items() if "/" in k and k not in OF_TIME} for line in read_metrics(run)]
        for run in (whole, parts)
    ]
    assert "untrained/knn" in figures[0][0]
    assert "eval/knn" in figures[0][-1]
    assert figures[0] == figures[1]
    assert load_encoder(whole)[1].figures == load_encoder(parts)[1].figures


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    done = pretrain(tiny_pretrain(tmp_path / "run", "steps=3"))
    before = (done / "encoder.safetensors").read_bytes()
    again = pretrain(tiny_pretrain(tmp_path / "run", "steps=3", "resume=auto"))
    assert (again / "encoder.safetensors").read_bytes() == before


def test_a_changed_config_is_named(tmp_path: Path) -> None:
    pretrain(tiny_pretrain(tmp_path / "run", "steps=2"))
    with pytest.raises(ConfigError, match=r"`optim\.lr` was 0\.002 and is now 0\.5"):
        pretrain(tiny_pretrain(tmp_path / "run", "steps=2", "resume=auto", "optim.lr=0.5"))
    with pytest.raises(ConfigError, match="resume=auto"):
        pretrain(tiny_pretrain(tmp_path / "run", "steps=2"))
    # One word goes on despite it. Of the data a part is held out now: its fingerprint is another.
    changed = pretrain(tiny_pretrain(tmp_path / "run", "steps=3", "resume=changed", "optim.lr=0.5", "data.val=3000"))
    lines = read_metrics(changed)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[3]["pretrain/lr"] > 20 * lines[2]["pretrain/lr"]  # the optimizer obeys the new rate, too
    noted = json.loads((changed / "run.json").read_text())["starts"][-1]["changed"]
    assert [sentence.split()[0] for sentence in noted] == ["`data.val`", "`optim.lr`", "`steps`", "`train`", "`val`"]


def test_a_change_that_leaves_no_step_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    run = pretrain(tiny_pretrain(tmp_path / "run", "steps=3"))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    for words in (["steps=2"], ["steps=3", "optim.lr=0.5"], ["batch_size=16", "steps=3"]):
        with pytest.raises(ConfigError, match=r"nothing is left to train: 3 steps were taken.*steps=6"):
            pretrain(tiny_pretrain(run, "resume=changed", *words))
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_another_batch_size_keeps_the_epoch_and_says_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = color_folder(tmp_path / "photos", 24)
    tiny = [word for word in TINY if not word.startswith(("data.", "batch."))] + [
        "data=folder",
        f"data.path={photos}",
        "num_workers=0",
    ]

    def config(*more: str) -> PretrainConfig:
        return load("pretrain", PretrainConfig, [*tiny, "epochs=2", f"output={tmp_path / 'run'}", *more])

    given, samples = dict[int, list[int]](), IndexedLoader.samples

    def noted(self: IndexedLoader, step: int) -> torch.Tensor:
        found = samples(self, step)
        given.setdefault(self.clock(step).epoch, []).extend(found.tolist())
        return found

    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, done: int, state: dict[str, Any]) -> None:
        save(self, done, state)
        raise StoppedError

    monkeypatch.setattr(IndexedLoader, "samples", noted)
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", save_and_stop)
        with pytest.raises(StoppedError):
            pretrain(config("batch_size=8", "save_every=3 steps"))
    run = pretrain(config("batch_size=16", "save_every=3 steps", "resume=changed"))
    lines = [line for line in read_metrics(run) if "pretrain/lr" in line]
    count = len(config().data.open_pool() or ())
    steps = 3 + (count - 24) // 16 + count // 16
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert len(set(given[0])) == len(given[0]) == 24 + (count - 24) // 16 * 16
    assert len(set(given[1])) == len(given[1]) == count // 16 * 16
    assert (
        f"after step 3 of {steps}: the learning rate leaps from {lines[2]['pretrain/lr']:.3g}"
        in capsys.readouterr().out
    )
    again = pretrain(config("batch_size=16", "save_every=3 steps", "resume=auto"))
    assert max(line["step"] for line in read_metrics(again)) == steps


@pytest.mark.parametrize("word", ["backbone.width=8", "optim=sgd"])
def test_another_network_or_optimizer_does_not_fit(word: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(tiny_pretrain(run, "steps=2", "optim=adamw"))
    if word == "optim=sgd":  # its momentum starts anew
        assert (pretrain(tiny_pretrain(run, "steps=3", word, "resume=changed")) / "encoder.safetensors").is_file()
        return
    with pytest.raises(ConfigError, match="the checkpoint does not fit this configuration"):
        pretrain(tiny_pretrain(run, "steps=3", "optim=adamw", word, "resume=changed"))


def test_the_best_encoder_by_val_is_kept_and_survives_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.1, 0.3, 0.5, 0.4, 0.2, 0.3, 0.5, 0.4, 0.2])  # before, then at steps 2 to 8; stopped in the middle
    monkeypatch.setattr(OnlineEvaluation, "_knn", lambda *_: next(values))
    length = ["steps=8", "evaluate_every=2 steps", "save_every=3 steps"]
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, done: int, state: dict[str, Any]) -> None:
        save(self, done, state)
        if done == 6:
            raise StoppedError

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(StoppedError):
        pretrain(tiny_pretrain(tmp_path / "run", *length))
    stopped = load_encoder(tmp_path / "run" / "best")[1]
    (tmp_path / "run" / "checkpoints" / "step-000000006.pt").unlink()  # so that the best step is done again
    values = iter([0.5, 0.4, 0.2])
    monkeypatch.setattr(Checkpoints, "save", save)
    run = pretrain(tiny_pretrain(tmp_path / "run", *length, "resume=auto"))
    best = load_encoder(run / "best")[1]
    assert stopped.figures["step"] == best.figures["step"] == 4
    assert best.figures["eval/knn"] == 0.5
    assert load_encoder(run)[1].figures["eval/knn"] == 0.2


def test_the_best_of_another_configuration_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.1, 0.9, 0.3, 0.2])  # before, then at steps 2, 4 and 6
    monkeypatch.setattr(OnlineEvaluation, "_knn", lambda *_: next(values))
    length = ["evaluate_every=2 steps", "save_every=3 steps"]
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, done: int, state: dict[str, Any]) -> None:
        save(self, done, state)
        raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", save_and_stop)
        with pytest.raises(StoppedError):
            pretrain(tiny_pretrain(tmp_path / "run", *length, "steps=4"))
    run = pretrain(tiny_pretrain(tmp_path / "run", *length, "steps=4", "resume=auto"))
    assert load_encoder(run / "best")[1].figures["step"] == 2  # of the same configuration the best stays
    pretrain(tiny_pretrain(run, *length, "steps=6", "resume=changed"))
    best = load_encoder(run / "best")[1].figures
    assert (best["step"], best["eval/knn"]) == (6, 0.2)
