"""10 steps equal 5, a stop, and 5 more: bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.evaluate.online import OnlineEvaluation
from ssl_pipeline.model.artifact import load_encoder
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.track.jsonl import read_metrics
from tests.runs import same_bytes, small_pretext, tiny_pretrain

LENGTH = ["steps=10", "checkpoint_every=5 steps"]


class StoppedError(Exception):
    """The plug was pulled."""


@pytest.mark.parametrize(
    "words",
    [
        [],
        [*small_pretext("instance_discrimination"), "batch.micro=16"],
        [*small_pretext("moco_v2"), "pretext.temperature.learned.least=0.05"],
        [*small_pretext("swav"), "views.local.count=2", "views.local.size=8", "pretext.queue_start=3 steps"],
    ],
    ids=["simclr", "a memory, two passes", "a queue, a teacher, a learned temperature", "prototypes, multi-crop"],
)
def test_a_stopped_run_continues_to_the_same_bits(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = [*LENGTH, *words]
    whole = pretrain(tiny_pretrain(tmp_path / "whole", *length))
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, done: int, state) -> None:  # type: ignore[no-untyped-def]
        save(self, done, state)
        raise StoppedError

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(StoppedError):
        pretrain(tiny_pretrain(tmp_path / "parts", *length))
    monkeypatch.setattr(Checkpoints, "save", save)
    parts = pretrain(tiny_pretrain(tmp_path / "parts", *length, "resume=auto"))
    assert same_bytes(whole, parts, ["encoder.safetensors"])
    for folder in (whole, parts):
        assert [line["step"] for line in read_metrics(folder)] == list(range(11))
    losses = [[line.get("pretrain/loss") for line in read_metrics(folder)] for folder in (whole, parts)]
    assert losses[0] == losses[1]


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
    changed = pretrain(tiny_pretrain(tmp_path / "run", "steps=3", "resume=changed", "optim.lr=0.5", "data.dev=3000"))
    assert [line["step"] for line in read_metrics(changed)] == [0, 1, 2, 3]
    noted = json.loads((changed / "run.json").read_text())["starts"][-1]["changed"]
    assert [sentence.split()[0] for sentence in noted] == ["`data.dev`", "`optim.lr`", "`steps`", "the", "the"]


def test_the_best_encoder_by_dev_is_kept_and_survives_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.1, 0.3, 0.5, 0.4, 0.2, 0.3, 0.5, 0.4, 0.2])  # before, then at steps 2 to 8; stopped in the middle
    monkeypatch.setattr(OnlineEvaluation, "_knn", lambda *_: next(values))
    length = ["steps=8", "evaluate_every=2 steps", "checkpoint_every=3 steps"]
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, done: int, state) -> None:  # type: ignore[no-untyped-def]
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
