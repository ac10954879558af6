"""10 steps equal 5, a stop, and 5 more: bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.engine.checkpoint import Checkpoints
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


def test_a_half_written_checkpoint_is_not_taken(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", "data")
    for done in (1, 2, 3):
        checkpoints.save(done, {"task": {}})
    (tmp_path / "checkpoints" / ".step-000000009.pt").write_bytes(b"half")
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == [
        "step-000000002.pt",
        "step-000000003.pt",
    ]
    state = checkpoints.load()
    assert state is not None
    assert state["done"] == 3
    with pytest.raises(ConfigError, match="other data"):
        Checkpoints(tmp_path / "checkpoints", "changed").load()
    (tmp_path / "checkpoints" / "step-000000003.pt").write_bytes(b"rot")
    with pytest.raises(ConfigError, match="remove it"):
        checkpoints.load()
