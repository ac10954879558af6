"""Stage two in the report: means, intervals, differences by hand and by seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ssl_pipeline.report.charts import label_efficiency
from ssl_pipeline.report.page import page
from ssl_pipeline.report.read import read_runs
from ssl_pipeline.report.summary import runs_comparison, study_comparison, summary
from ssl_pipeline.report.tables import confusion, domain_table, results_table
from tests.report_page import Page, blind
from tests.report_runs import write_finetune, write_study


def test_stage_two_with_its_interval(tmp_path: Path) -> None:
    run = read_runs([write_finetune(tmp_path / "run", [0.7, 0.8, 0.9], seed=4)])[0]
    table = results_table(run)
    assert table
    # Student's t with two degrees of freedom: 4.3027 · 0.1 / √3.
    assert table.rows == [["accuracy", "80.0 ± 24.8", "70.0", "80.0", "90.0"]]
    assert table.columns[2:] == ["seed 4", "seed 5", "seed 6"]
    assert summary(run) == [
        "LP-FT classification from pretrained weights: accuracy on test 80.0 ± 24.8 % over 3 seeds."
    ]


def test_runs_are_compared_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    first = write_finetune(tmp_path / "a", [0.5, 0.6, 0.7], seed=0)
    second = write_finetune(tmp_path / "b", [0.7, 0.9], seed=1)
    found = runs_comparison(read_runs([first, second]))
    assert found
    assert found.baseline == "a"
    difference_of_b = found.difference("b")
    assert difference_of_b
    assert difference_of_b.mean == pytest.approx((0.7 - 0.6 + 0.9 - 0.7) / 2)
    apart = write_finetune(tmp_path / "c", [0.7], seed=9)
    none_shared = runs_comparison(read_runs([first, apart]))
    assert none_shared
    assert none_shared.difference("c") is None


def test_a_study_is_compared_by_seed(tmp_path: Path) -> None:
    values = {"scratch": [0.5, 0.5, 0.6], "pretrained": [0.7, 0.7, 0.8]}
    rows = [
        {"init": init, "regime": "lp_ft", "labels": 10, "label_count": 100, "seed": seed, "figures": {"accuracy": value}}
        for init, of_init in values.items() for seed, value in enumerate(of_init)
    ]  # fmt: skip
    record = {
        "rows": rows,
        "baseline": {"init": "scratch", "regime": "lp_ft"},
        "split": "test",
        "figure": "accuracy",
        "in_percent": True,
    }
    run = read_runs([write_study(tmp_path / "study", record)])[0]
    found = study_comparison(run)
    assert found
    (other,) = found.against
    gain = found.difference(other)
    assert gain
    assert gain.mean == pytest.approx(0.2)
    assert gain.half == pytest.approx(0, abs=1e-9)
    assert "+20.0 ± 0.0 points (95 % interval, paired by seed): a gain." in summary(run)[0]
    assert "+20.0 ± 0.0" in Page(page([run], images=blind)).text


def grid(figure: str = "accuracy") -> list[dict[str, Any]]:
    """Two initializations × two label counts × two seeds; pretraining brings 0.1 with 5 a class and 0.2 with 20."""
    return [
        {"init": init, "regime": regime, "labels": labels, "label_count": 10 * labels, "seed": seed,
         "figures": {figure: 0.3 + 0.01 * seed + (gain if init == "pretrained" else 0)}}
        for init, regime in (("random", "scratch"), ("pretrained", "lp_ft")) for labels, gain in ((5, 0.1), (20, 0.2)) for seed in (0, 1)
    ]  # fmt: skip


def test_each_label_count_is_compared_with_its_own_baseline(tmp_path: Path) -> None:
    record = {"rows": grid(), "baseline": {"init": "random", "regime": "scratch"}, "left_out": {"official": "no network"},
              "conclusion": ["One.", "Two."]}  # fmt: skip
    run = read_runs([write_study(tmp_path / "study", record)])[0]
    found = study_comparison(run)
    assert found
    assert found.table().columns == ["condition", "mean ± 95 %", "against random, scratch", "seeds"]
    assert [(row[0], row[2]) for row in found.table().rows] == [
        ("random, scratch, 5 a class", "—"), ("random, scratch, 20 a class", "—"),
        ("pretrained, LP-FT, 5 a class", "+10.0 ± 0.0"), ("pretrained, LP-FT, 20 a class", "+20.0 ± 0.0"),
    ]  # fmt: skip
    assert summary(run) == ["One.", "Two.", "official was left out: no network"]
    (chart,) = label_efficiency([run])
    assert [row[0] for row in chart.lines[0].points] == [50, 200]


def test_a_study_that_is_going_shows_its_cells(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", {})
    (folder / "study.json").unlink()
    (folder / "cells").mkdir()
    for place, row in enumerate(grid()[:3]):
        (folder / "cells" / f"{place}.json").write_text(json.dumps(row))
    (folder / "cells" / "3.json").write_text("{")
    (run,) = read_runs([folder])
    assert (run.stage, run.state) == ("study", "stopped")
    found = study_comparison(run)
    assert found
    assert found.values == {"random, scratch, 5 a class": {0: 0.3, 1: 0.31}, "random, scratch, 20 a class": {0: 0.3}}
    assert "3.json is damaged" in Page(page([run], images=blind)).text


def test_cells_of_a_study_across_domains_are_told_apart_by_their_files(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", {})
    (folder / "study.json").unlink()
    (folder / "cells").mkdir()
    for name, value in {"edges_adabn_0": 0.5, "edges_adabn_1": 0.7, "edges_source_only_0": 0.25}.items():
        (folder / "cells" / f"{name}.json").write_text(json.dumps({"settings": {}, "figures": {"accuracy": value}}))
    found = study_comparison(read_runs([folder])[0])
    assert found
    assert found.values == {"edges adabn": {0: 0.5, 1: 0.7}, "edges source only": {0: 0.25}}


def test_figures_that_are_no_shares_are_not_told_in_percent(tmp_path: Path) -> None:
    record = {
        "rows": grid("mean_absolute_error"),
        "in_percent": False,
        "baseline": {"init": "random", "regime": "scratch"},
    }
    run = read_runs([write_study(tmp_path / "study", record)])[0]
    text = Page(page([run], images=blind)).text
    assert "study: mean absolute error" in text
    assert "+0.2 ± " in text
    assert "(%)" not in text


def test_label_efficiency_is_drawn_over_the_labels(tmp_path: Path) -> None:
    rows = [
        {"init": "pretrained", "regime": "frozen", "labels": labels, "label_count": labels, "seed": seed, "figures": {"accuracy": labels / 100 + seed / 10}}
        for labels in (5, 20) for seed in (0, 1)
    ]  # fmt: skip
    run = read_runs([write_study(tmp_path / "study", {"rows": rows})])[0]
    (chart,) = label_efficiency([run])
    (line,) = chart.lines
    assert line.name == "pretrained, frozen"
    assert [row.step for row in line.points] == [5.0, 20.0]
    assert [row.value for row in line.points] == pytest.approx([0.1, 0.25])
    first = line.points[0]
    assert first.high is not None
    assert first.value is not None
    assert first.high - first.value == pytest.approx(12.706 * 0.0707107 / 2**0.5, rel=1e-3)


def test_an_interval_of_shares_ends_where_shares_do(tmp_path: Path) -> None:
    rows = [
        {"init": "pretrained", "regime": "frozen", "labels": labels, "label_count": labels, "seed": seed, "figures": {"accuracy": value}}
        for labels in (5, 20) for seed, value in enumerate((0.1, 0.9))
    ]  # fmt: skip
    run = read_runs([write_study(tmp_path / "study", {"rows": rows})])[0]
    (chart,) = label_efficiency([run])
    assert [list(row[4:]) for row in chart.lines[0].points] == [[0.0, 1.0], [0.0, 1.0]]


@pytest.mark.parametrize("found", [
    {"classes": ["a"], "matrix": [["x"]]}, {"classes": ["a"], "matrix": [[None]]}, {"classes": ["a"], "matrix": [[float("nan")]]},
])  # fmt: skip
def test_a_broken_confusion_is_left_out(tmp_path: Path, found: dict[str, Any]) -> None:
    (run,) = read_runs([write_finetune(tmp_path / "run", [0.5], confusion=found)])
    assert confusion(run) is None
    page([run], images=blind)


def test_what_is_no_share_and_what_is_no_number(tmp_path: Path) -> None:
    folder = write_finetune(tmp_path / "run", [0.5], confusion={"classes": 3, "matrix": [[1]]})
    results = json.loads((folder / "results.json").read_text())
    results["figures"] = [{"accuracy": 0.5, "label_free/entropy": 1.7, "loss": float("nan")}]
    (folder / "results.json").write_text(json.dumps(results))
    (run,) = read_runs([folder])
    table = results_table(run)
    assert table
    assert table.rows == [["accuracy", "50.0", "50.0"], ["label free/entropy", "1.7", "1.7"]]
    assert confusion(run) == {"run": run.name, "classes": ["0"], "rows": [("0", [{"count": 1, "share": 1.0}])]}


def test_a_study_with_a_table_of_its_own_is_not_called_empty(tmp_path: Path) -> None:
    (run,) = read_runs([write_study(tmp_path / "a", {"figures": {"edges": {}}, "conclusion": ["It helps."]})])
    assert summary(run) == ["It helps."]
    (run,) = read_runs([write_study(tmp_path / "b", {"known": [], "figures": {"trained": {}}})])
    assert summary(run) == ["Its figures are in its own table, study.json."]


def test_the_headline_is_the_claimed_condition_and_not_the_best_one(tmp_path: Path) -> None:
    values = {"scratch": 0.5, "end_to_end": 0.9, "lp_ft": 0.6}
    rows = [
        {"init": "a", "regime": regime, "labels": 10, "seed": seed, "figures": {"accuracy": value + 0.01 * seed}}
        for regime, value in values.items() for seed in (0, 1)
    ]  # fmt: skip
    record = {"rows": rows, "baseline": {"init": "a", "regime": "scratch"}, "reported_regime": "lp_ft"}
    found = study_comparison(read_runs([write_study(tmp_path / "study", record)])[0])
    assert found
    told = found.headline()
    assert told
    assert told[0] == "a, LP-FT"
    assert told[1].mean == pytest.approx(0.1)


def test_confusion_and_domains(tmp_path: Path) -> None:
    folder = write_finetune(tmp_path / "run", [0.5], confusion={"classes": ["cat", "dog"], "matrix": [[3, 1], [0, 4]]})
    rows = [
        {"method": "source_only", "source": "photo", "target": target, "seed": seed, "figures": {"accuracy": value}}
        for target, values in {"sketch": [0.2, 0.4], "cartoon": [0.5, 0.5]}.items() for seed, value in enumerate(values)
    ]  # fmt: skip
    (folder / "domain.json").write_text(json.dumps({"rows": rows}))
    run = read_runs([folder])[0]
    found = confusion(run)
    assert found
    assert found["rows"][0] == ("cat", [{"count": 3, "share": 0.75}, {"count": 1, "share": 0.25}])
    table = domain_table(run)
    assert table
    assert table.columns == ["method", "trained on", "sketch", "cartoon"]
    assert table.rows == [["source only", "photo", "30.0 ± 127.1", "50.0 ± 0.0"]]
    assert {"stage-two", "domains"} <= Page(page([run], images=blind)).ids()
