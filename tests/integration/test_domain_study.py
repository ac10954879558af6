"""The study across domains: a table of every row, resumable cell by cell, whose choices know no label of the target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.config.compose import choices
from ssl_pipeline.domain.metrics import proxy_a_distance
from ssl_pipeline.finetune import finetune
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.report.page import page
from ssl_pipeline.report.read import read_runs
from ssl_pipeline.report.tables import domain_table
from ssl_pipeline.study.domain import DomainStudyConfig, chosen, sentences, study, tabulate
from ssl_pipeline.study.jobs import CellRunner, TrainJob
from tests.report_page import Page, blind
from tests.runs import tiny_pretrain

COMMON = [
    "data=fashion_domains", "data.val=4000", "split=val", "regime=scratch", "regime.length=2 steps", "regime.min_steps=0",
    "labels.per_class=10", "backbone.width=4", "size=12", "tracking=off",
]  # fmt: skip
ROWS = {"source only": ["domain=source_only"], "AdaBN": ["domain=adabn"], "bound": ["data.domains=[{target}]"]}


def tiny(output: Path, **keys: object) -> DomainStudyConfig:
    wanted = {
        "common": COMMON, "source": "original", "targets": ["edges"], "methods": ROWS, "baseline": "source only", "seeds": 1,
        "output": str(output),
    }  # fmt: skip
    return DomainStudyConfig.model_validate(wanted | keys)


def test_a_study_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = study(tiny(tmp_path / "study"))
    first = (folder / "study.json").read_text()
    (folder / "cells" / "edges_adabn_0.json").unlink()
    measured, train = list[str](), CellRunner.train

    def counted(runner: CellRunner, job: TrainJob) -> dict[str, float]:
        measured.append(job.record.name)
        return train(runner, job)

    monkeypatch.setattr(CellRunner, "train", counted)
    study(tiny(tmp_path / "study", resume="auto"))
    assert measured == ["edges_adabn_0.json"]
    assert (folder / "study.json").read_text() == first
    with Image.open(folder / "map_edges.png") as picture:
        assert picture.width > 300
    run = read_runs([folder])[0]
    table = domain_table(run)
    assert table is not None
    assert table.columns == ["method", "trained on", "edges"]
    assert [row[:2] for row in table.rows] == [[name, "original"] for name in ROWS]
    assert "domains" in Page(page([run], images=blind)).ids()


def test_domains_that_can_be_told_apart_are_far() -> None:
    rows = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    near, far = rows[:200], rows[200:]
    assert proxy_a_distance(near, far) < 0.4
    assert proxy_a_distance(near, far + 8) == 2
    assert proxy_a_distance(rows[:2], rows[2:4]) >= 0
    half = torch.cat([far[:100], far[100:] + torch.tensor([20.0, 0, 0, 0, 0])])[
        torch.arange(200).view(2, 100).T.flatten()
    ]
    assert proxy_a_distance(near, half) == pytest.approx(1, abs=0.3)  # half of them look like the others: ε = 1/4


def test_a_choice_follows_its_figure_and_a_bound_is_no_candidate(tmp_path: Path) -> None:
    config = tiny(tmp_path, seeds=2, select="entropy")
    rows = {
        "source only": [{"accuracy": 0.5, "label_free/entropy": 0.1}, {"accuracy": 0.5, "label_free/entropy": 0.3}],
        "AdaBN": [{"accuracy": 0.7, "label_free/entropy": 0.2}, {"accuracy": 0.71, "label_free/entropy": 0.2}],
        "bound": [{"accuracy": 0.9}, {"accuracy": 0.9}],
    }
    columns, table = tabulate(rows, config)
    assert [row[-2:] for row in table[:3]] == [["1", "0"], ["1", "2"], ["", ""]]
    assert columns[3] == "verdict (Holm, 1 comparison)"
    assert [row[3] for row in table] == ["", "helps", "", "", ""]
    assert table[3][1].startswith("60.5")
    assert table[4][1].startswith("70.5")
    assert chosen({"a": {"label_free/snd": 1.0}, "b": {"label_free/snd": 2.0}}, "label_free/snd") == "b"
    with pytest.raises(ConfigError, match=r"labels\.validation above 0"):
        chosen({"a": {}}, "source_validation")


@pytest.mark.parametrize("compared", choices("comparison"))
def test_the_configurations_that_come_along_are_whole(compared: str) -> None:
    config = load("study_domain", DomainStudyConfig, [f"comparison={compared}", 'encoder="runs/union-{seed}"'])
    assert config.baseline in config.methods
    for method in config.methods:
        found = load("finetune", FinetuneConfig, config.overrides(method, config.shifts()[1], 2))
        assert found.encoder == "runs/union-2"
        assert found.data.name == "fashion_domains"


def test_joint_methods_stand_beside_both_domains_without_their_term(tmp_path: Path) -> None:
    config = load("study_domain", DomainStudyConfig, ["targets=[edges]"])
    overrides = config.overrides("both domains, weight 0", config.shifts()[0], 0)
    short = [text for text in COMMON if not text.startswith("data=")]
    weights = []
    for name in ("mcc", "information_maximization", "source_only"):  # whose term it is does not matter
        own = [text.replace("domain=mcc", f"domain={name}") for text in overrides]
        own = own if name != "source_only" else [text for text in own if "weight" not in text]
        run = finetune(load("finetune", FinetuneConfig, [*own, *short, f"output={tmp_path / name}"]))
        weights.append(load_file(run.folder / "model.safetensors"))
    joint, other, alone = weights
    assert all(torch.equal(joint[key], other[key]) for key in joint)
    assert not all(torch.equal(joint[key], alone[key]) for key in joint)


def test_verdicts_of_a_table_are_corrected_for_their_number(tmp_path: Path) -> None:
    gains = (0.10, 0.14, 0.06)  # p = 0.05 of 3 seeds is at a mean of 4.3 standard errors; this one is 4.33
    base = [{"accuracy": value, "label_free/snd": 0.0} for value in (0.3, 0.5, 0.4)]
    better = [
        {"accuracy": own["accuracy"] + gain, "label_free/snd": 0.0} for own, gain in zip(base, gains, strict=True)
    ]
    for others, expected in ((0, "helps"), (3, "no gain beyond chance")):
        rows = {"source only": base, "AdaBN": better} | {f"method {n}": base for n in range(others)}
        methods = {name: ["domain=adabn"] for name in rows} | {"source only": ["domain=source_only"]}
        config = tiny(tmp_path, seeds=3, methods=methods)
        columns, table = tabulate(rows, config)
        assert columns[3] == f"verdict (Holm, {others + 1} comparison{'s' if others else ''})"
        assert table[1][3] == expected
        assert f"{expected}: AdaBN" in sentences({"edges": rows}, config)[0]


def test_pretraining_is_compared_with_the_same_network_from_scratch(tmp_path: Path) -> None:
    pretrain(tiny_pretrain(tmp_path / "seed-0", "data=fashion_domains", "data.domains=[original,edges]", "steps=2"))
    words = [
        "comparison=pretraining", f"output={tmp_path / 'study'}", "targets=[edges]", "seeds=1",
        f'encoder="{tmp_path}/seed-{{seed}}"',
    ]  # fmt: skip
    short = [
        "labels.per_class=10", "data.val=4000", "split=val", "regime.length=2 steps", "regime.min_steps=0",
    ]  # fmt: skip
    config = load("study_domain", DomainStudyConfig, words)
    folder = study(config.model_copy(update={"common": (*config.common, *short)}))
    figures = json.loads((folder / "study.json").read_text())["figures"]
    assert set(figures["edges"]) == {"scratch", "scratch, AdaBN", "pretrained, LP-FT"}
    nobody = load("study_domain", DomainStudyConfig, ["comparison=pretraining"])
    with pytest.raises(ConfigError, match="`encoder` is required"):
        study(nobody)


def test_a_wrong_row_is_told_before_anything_trains(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`baseline` 'x' is none of the methods"):
        study(tiny(tmp_path / "study", baseline="x"))
    with pytest.raises(ConfigError, match="`domain=dan`"):
        study(tiny(tmp_path / "study", methods=ROWS | {"AdaBN": ["domain=dan"]}))
    assert not (tmp_path / "study").exists()


def test_controls_are_rows_of_the_study_and_a_gain_there_is_told(tmp_path: Path) -> None:
    config = tiny(tmp_path, negative_controls=True, seeds=2)
    names = ["edges", "no shift", "edges as noise", "edges as shuffled"]
    assert [shift.name for shift in config.shifts()] == names
    assert config.shifts()[2].methods == ["source only", "AdaBN"]
    for shift in config.shifts()[1:]:
        found = load("finetune", FinetuneConfig, config.overrides("AdaBN", shift, 0)).domain
        assert found is not None
        assert found.negative_control == shift.control
    base = [{"accuracy": 0.5}, {"accuracy": 0.52}]
    gain = [{"accuracy": 0.6}, {"accuracy": 0.621}]
    cells = {name: {"source only": base, "AdaBN": gain if "noise" in name else base, "bound": gain} for name in names}
    told = sentences(cells, config)
    assert told[0] == "original → edges: no gain beyond chance: AdaBN."
    assert told[2].startswith(
        "control, original → edges as noise: helps: AdaBN. No gain was to be had from the target there"
    )
    assert len(told) == 4


def test_a_study_with_controls_runs(tmp_path: Path) -> None:
    rows = {"source only": ["domain=source_only"]}
    folder = study(tiny(tmp_path / "study", negative_controls=True, methods=rows))
    figures = json.loads((folder / "study.json").read_text())["figures"]
    assert list(figures) == ["edges", "no shift", "edges as noise", "edges as shuffled"]
    noise, real = figures["edges as noise"]["source only"][0], figures["edges"]["source only"][0]
    assert noise["accuracy"] == real["accuracy"]  # it never sees the target, and is measured on the real one
    assert (
        figures["no shift"]["source only"][0]["accuracy"] == figures["no shift"]["source only"][0]["accuracy/original"]
    )
