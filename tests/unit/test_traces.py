"""The comparison of traces (``tests/golden/traces.py``): a bit is enough, and names are not."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.golden import traces
from tests.runs import ROOT


def run(folder: Path, loss: float = 0.1, name: str = "pretrain/loss", keys: tuple[str, str] = ("a", "b")) -> Path:
    """A run's folder: two lines of metrics, and a file of weights."""
    folder.mkdir(parents=True)
    lines: list[dict[str, float]] = [{"step": 1, "time": 1.5, name: 0.5}, {"step": 2, "time": 2.5, name: loss}]
    (folder / traces.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_file({keys[0]: torch.arange(3.0), keys[1]: torch.zeros(2)}, folder / "encoder.safetensors")
    return folder


def trace(folder: Path) -> dict[str, Any]:
    return vars(traces.Trace(traces.metrics_of(folder), traces.weights_of(folder)))


def test_one_bit_of_a_loss_is_found_and_named(tmp_path: Path) -> None:
    before = trace(run(tmp_path / "before"))
    after = trace(run(tmp_path / "after", loss=math.nextafter(0.1, 1)))
    assert traces.differences(before, before) == []
    (told,) = traces.differences(before, after)
    assert told.startswith("line 2 of metrics.jsonl: pretrain/loss was 0.1 (0x1.999999999999ap-4) and is 0.1 (")


def test_other_names_of_metrics_and_weights_are_the_same_trace(tmp_path: Path) -> None:
    before = trace(run(tmp_path / "before"))
    after = trace(run(tmp_path / "after", name="train/objective", keys=("z", "c")))
    assert traces.differences(before, after) == []


def test_one_bit_of_a_weight_is_found(tmp_path: Path) -> None:
    before, folder = trace(run(tmp_path / "before")), run(tmp_path / "after")
    changed = torch.arange(3.0)
    changed[1] = torch.nextafter(changed[1], changed[2])
    save_file({"a": changed, "b": torch.zeros(2)}, folder / "encoder.safetensors")
    assert traces.differences(before, trace(folder)) == ["the weights differ"]


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda found: found["steps"].pop(), "2 lines of metrics.jsonl recorded, 1 found"),
        (lambda found: found["steps"][0]["values"].append("1"), "line 1 of metrics.jsonl: recorded step, pretrain/loss; found"),
        (lambda found: found["table"].append("1.0"), "the table differ"),
        (lambda found: found.update(pixels="ab"), "the pixels differ"),
    ],
)  # fmt: skip
def test_what_is_missing_or_more_is_found(edit: Callable[[dict[str, Any]], object], told: str, tmp_path: Path) -> None:
    before = trace(run(tmp_path / "run"))
    after = copy.deepcopy(before)
    edit(after)
    (difference,) = traces.differences(before, after)
    assert difference.startswith(told)


def test_check_fails_where_a_trace_differs_or_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = traces.Trace(traces.metrics_of(run(tmp_path / "run")))
    monkeypatch.setattr(traces, "TRACES", {"one": ["pretrain"], "two": ["pretrain"]})
    monkeypatch.setattr(traces.Runner, "trace", lambda self, name: found)
    file = tmp_path / "traces.json"
    assert traces.main(["record", str(file)]) == 0
    assert traces.main(["check", str(file)]) == 0
    recorded = json.loads(file.read_text())
    recorded["traces"]["one"]["steps"][1]["values"][1] = (0.1 + 2**-56).hex()
    recorded["traces"]["three"] = recorded["traces"].pop("two")
    file.write_text(json.dumps(recorded))
    capsys.readouterr()
    assert traces.main(["check", str(file)]) == 1
    told = capsys.readouterr().out
    assert "line 2 of metrics.jsonl: pretrain/loss" in told
    assert "two" in told
    assert "is not in the file" in told
    assert "three" in told
    assert "0 of 2 traces are the same" in told


@pytest.mark.parametrize(("group", "folder"), [("pretext", "pretext"), ("domain", "domain"), ("source", "data")])
def test_every_member_of_a_group_has_a_trace(group: str, folder: str) -> None:
    members = {file.stem for file in (ROOT / "configs" / folder).glob("*.yaml")}
    assert members
    assert members <= {name.removeprefix(f"{group}/") for name in traces.TRACES if name.startswith(f"{group}/")}
