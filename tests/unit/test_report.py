"""The report against the files that it reads: each figure, each broken folder, nothing that escapes its place."""

from __future__ import annotations

import fcntl
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.source import ArraySource
from ssl_pipeline.report.command import main, report, watch
from ssl_pipeline.report.comparison import runs_comparison, study_comparison
from ssl_pipeline.report.curves import charts, points, thin
from ssl_pipeline.report.look import Look, look, map_of, neighbour_strips, spectrum
from ssl_pipeline.report.page import page
from ssl_pipeline.report.planes import neighbour_plane, planes, principal_plane
from ssl_pipeline.report.read import read_runs
from ssl_pipeline.report.settings import difference
from ssl_pipeline.report.stage_two import confusion, domain_table, results_table
from ssl_pipeline.report.summary import duration, summary
from tests.report_runs import write_finetune, write_pretrain, write_study


class Page(HTMLParser):
    """What a page says, and the elements it is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self._inside = list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._inside[-1:]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def ids(self) -> set[str]:
        return {str(attributes["id"]) for _, attributes in self.tags if "id" in attributes}


def blind(_: Any) -> Look:
    return Look()


def payload(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    assert not set("<>&") & set(found.group(1))  # nothing in it can end it
    tree: dict[str, Any] = json.loads(found.group(1))
    return tree


def test_curves_are_what_was_logged(tmp_path: Path) -> None:
    run = read_runs([write_pretrain(tmp_path / "run")])[0]
    by_key = {chart["key"]: chart for chart in charts([run])}
    assert {"loss", "knn", "lr", "images_per_s", "data_wait", "temperature", "entropy_share", "hardest_1pct", "feature_std",
            "effective_rank"} == set(by_key)  # fmt: skip
    # Step, epoch, seconds and value; the evaluation's own "loss" is none of the pretext task's.
    assert by_key["loss"]["lines"][0]["points"][3] == [4, 0.4, 4.0, 2.5]
    assert [row[3] for row in by_key["loss"]["lines"][0]["points"]] == [
        pytest.approx(10 / step, rel=1e-5) for step in range(1, 21)
    ]
    assert [row[3] for row in by_key["knn"]["lines"][0]["points"]] == [0.5, 0.6, 0.7]
    assert [row[0] for row in by_key["knn"]["lines"][0]["points"]] == [0, 10, 20]
    assert payload(page([run], looking=blind))["charts"] == list(by_key.values())


def test_a_figure_that_is_no_number_is_a_gap(tmp_path: Path) -> None:
    folder = write_pretrain(tmp_path / "run", steps=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "time": 1767323048.0, "pretrain/loss": "nan"}\n')
    run = read_runs([folder])[0]
    assert points(run, ("loss",), step_only=True)[-1] == [3, 0.3, 3.0, None]
    payload(page([run], looking=blind))  # JSON knows no NaN: a page that held one would not be read


@given(st.integers(1, 5000), st.integers(2, 700))
def test_thinning_keeps_both_ends_and_the_order(count: int, most: int) -> None:
    rows: list[list[float | None]] = [[float(i)] for i in range(count)]
    kept = thin(rows, most)
    assert kept[0] == rows[0]
    assert kept[-1] == rows[-1]
    assert len(kept) <= most + 1
    assert kept == sorted(kept, key=lambda row: row[0] or 0.0)
    assert len({row[0] for row in kept}) == len(kept)


def test_the_sentence_of_stage_one(tmp_path: Path) -> None:
    told = " ".join(summary(read_runs([write_pretrain(tmp_path / "run")])[0]))
    assert told.startswith("SimCLR trained small_resnet on embedded for 20 steps in 20 s.")
    assert "kNN accuracy on dev rose from 50.0 % untrained to 70.0 %." in told
    assert "did not collapse: std 0.80, effective rank 60" in told


def test_a_collapse_is_told(tmp_path: Path) -> None:
    folder = write_pretrain(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "eval/feature_std": 0.01, "eval/effective_rank": 1.0, "eval/knn": 0.1}\n')
    told = " ".join(summary(read_runs([folder])[0]))
    assert "have collapsed" in told
    assert "kNN accuracy on dev fell from 50.0 % untrained to 10.0 %" in told


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


@pytest.mark.parametrize("record", [
    {"accuracy": {"scratch": [0.5, 0.5, 0.6], "pretrained": [0.7, 0.7, 0.8]}, "baseline": "scratch"},
    {"rows": [{"init": init, "regime": "lp_ft", "labels": 10, "seed": seed, "figures": {"accuracy": value}}
              for init, values in {"scratch": [0.5, 0.5, 0.6], "pretrained": [0.7, 0.7, 0.8]}.items()
              for seed, value in enumerate(values)], "baseline": {"init": "scratch", "regime": "lp_ft"},
     "split": "test", "figure": "accuracy", "in_percent": True},
])  # fmt: skip
def test_a_study_of_either_form(tmp_path: Path, record: dict[str, Any]) -> None:
    run = read_runs([write_study(tmp_path / "study", record)])[0]
    found = study_comparison(run)
    assert found
    (other,) = found.against
    gain = found.difference(other)
    assert gain
    assert gain.mean == pytest.approx(0.2)
    assert gain.half == pytest.approx(0, abs=1e-9)
    assert "+20.0 ± 0.0 points (95 % interval, paired by seed): a gain." in summary(run)[0]
    assert "+20.0 ± 0.0" in Page(page([run], looking=blind)).text


def grid(figure: str = "accuracy") -> list[dict[str, Any]]:
    """Two initialisations × two label counts × two seeds; pretraining brings 0.1 with 5 a class and 0.2 with 20."""
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
    (chart,) = payload(page([run], looking=blind))["charts"]
    assert [row[0] for row in chart["lines"][0]["points"]] == [50, 200]


def test_a_study_that_is_going_shows_its_cells(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", {})
    (folder / "study.json").unlink()
    (folder / "config.yaml").write_text('{"common": [], "overrides": {}}')
    (folder / "cells").mkdir()
    for place, row in enumerate(grid()[:3]):
        (folder / "cells" / f"{place}.json").write_text(json.dumps(row))
    (folder / "cells" / "3.json").write_text("{")
    (run,) = read_runs([folder])
    assert (run.stage, run.state) == ("study", "stopped")
    found = study_comparison(run)
    assert found
    assert found.values == {"random, scratch, 5 a class": {0: 0.3, 1: 0.31}, "random, scratch, 20 a class": {0: 0.3}}
    assert "3.json is damaged" in Page(page([run], looking=blind)).text


def test_figures_that_are_no_shares_are_not_told_in_percent(tmp_path: Path) -> None:
    record = {
        "rows": grid("mean_absolute_error"),
        "in_percent": False,
        "baseline": {"init": "random", "regime": "scratch"},
    }
    run = read_runs([write_study(tmp_path / "study", record)])[0]
    text = Page(page([run], looking=blind)).text
    assert "study: mean absolute error" in text
    assert "+0.2 ± " in text
    assert "(%)" not in text


def test_label_efficiency_is_drawn_over_the_labels(tmp_path: Path) -> None:
    rows = [
        {"init": "pretrained", "regime": "frozen", "labels": labels, "seed": seed, "figures": {"accuracy": labels / 100 + seed / 10}}
        for labels in (5, 20) for seed in (0, 1)
    ]  # fmt: skip
    run = read_runs([write_study(tmp_path / "study", {"rows": rows})])[0]
    (chart,) = payload(page([run], looking=blind))["charts"]
    (line,) = chart["lines"]
    assert line["name"] == "pretrained, frozen"
    assert [(row[0], row[3]) for row in line["points"]] == [(5.0, pytest.approx(0.1)), (20.0, pytest.approx(0.25))]
    assert line["points"][0][5] - line["points"][0][3] == pytest.approx(12.706 * 0.0707107 / 2**0.5, rel=1e-3)


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
    assert {"stage-two", "domains"} <= Page(page([run], looking=blind)).ids()


def test_only_the_settings_that_differ(tmp_path: Path) -> None:
    runs = read_runs([write_pretrain(tmp_path / "a"), write_pretrain(tmp_path / "b", temperature=0.5, extra=None)])
    table = difference(runs)
    assert table
    assert table.rows == [["extra", "—", "null"], ["pretext.temperature.value", "0.1", "0.5"]]
    assert difference(runs[:1]) is None
    alike = read_runs([tmp_path / "a", write_pretrain(tmp_path / "c"), write_finetune(tmp_path / "d", [0.5])])
    assert "No setting differs" in page(alike, looking=blind)
    assert "No setting differs" not in page(alike[1:], looking=blind)  # stages have no settings to compare


def test_the_spectrum_of_known_features() -> None:
    torch.manual_seed(0)
    flat = torch.nn.functional.normalize(torch.randn(4000, 8), dim=1)
    found = spectrum(flat)
    assert found["share"] == pytest.approx([1 / 8] * 8, rel=0.15)
    assert found["std"] == pytest.approx([1.0] * 8, rel=0.1)
    assert sum(found["share"]) == pytest.approx(1, abs=1e-3)
    line = torch.randn(50, 1) * torch.tensor([[1.0, 0, 0, 0]]) + torch.tensor([[0, 1.0, 0, 0]])
    assert spectrum(line)["std"][2:] == [0.0, 0.0]
    assert spectrum(torch.ones(5, 4))["share"] == pytest.approx([0] * 4, abs=1e-6)


def test_the_plane_is_that_of_the_covariance() -> None:
    torch.manual_seed(1)
    features = torch.randn(60, 6)
    plane, variance = principal_plane(features)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    values, vectors = torch.linalg.eigh(torch.cov(unit.T, correction=0))
    expected = (unit - unit.mean(0)) @ vectors[:, [-1, -2]]
    assert torch.allclose(plane.abs(), expected.abs(), atol=1e-10)
    assert torch.allclose(variance, values[[-1, -2]] / values.sum())


def test_neighbours_stay_together_on_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    group = torch.arange(120) % 3
    features = torch.eye(3, 16)[group] * 4 + torch.randn(120, 16)
    plane = neighbour_plane(features)
    assert plane is not None
    nearest = torch.cdist(plane, plane).fill_diagonal_(torch.inf).argmin(1)
    assert (group[nearest] == group).float().mean() > 0.95
    again = neighbour_plane(features)
    assert again is not None
    assert torch.equal(plane, again)
    assert [layout["name"] for layout in planes(features)] == ["PCA", "t-SNE"]
    assert [layout["name"] for layout in planes(torch.ones(120, 16))] == ["PCA"]  # collapsed
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)  # not installed
    assert [layout["name"] for layout in planes(features)] == ["PCA"]


def small_source(count: int = 12) -> ArraySource:
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].mul(20).expand(count, 1, 8, 8).contiguous()
    return ArraySource("small", pixels, torch.arange(count) % 3, ("a", "b", "c"))


def test_neighbours_are_the_nearest_by_brute_force() -> None:
    torch.manual_seed(2)
    features, source, index = torch.randn(12, 5), small_source(), torch.arange(12)
    strips = neighbour_strips(features, source, index)
    unit = torch.nn.functional.normalize(features, dim=1)
    for strip in strips:
        query = int(strip["query"]["name"].removeprefix("image "))
        order = (unit @ unit[query]).argsort(descending=True).tolist()
        order.remove(query)
        assert [near["name"] for near in strip["near"]] == [f"image {i}" for i in order[:7]]
        assert [near["same"] for near in strip["near"]] == [i % 3 == query % 3 for i in order[:7]]
    assert [strip["query"]["label"] for strip in strips[:3]] == ["a", "b", "c"]


def test_the_map_has_a_place_and_a_thumbnail_for_each_image() -> None:
    torch.manual_seed(3)
    found = map_of(torch.randn(12, 5), small_source(), torch.arange(12))
    assert found
    (layout,) = found["layouts"]
    assert len(layout["points"]) == len(found["labels"]) == len(found["names"]) == 12
    assert all(0 <= x <= 1 and 0 <= y <= 1 for x, y in layout["points"])
    assert found["size"] == 8
    assert map_of(torch.randn(2, 5), small_source(2), torch.arange(2)) is None


WICKED = '"><script>alert(1)</script></script><img src=x onerror=alert(1)>&amp;'


def test_nothing_that_a_run_says_becomes_markup(tmp_path: Path) -> None:
    stage_one = write_pretrain(tmp_path / "run", note=WICKED, pretext={"name": WICKED, "temperature": {"value": 1}})
    stage_two = write_finetune(
        tmp_path / "two", [0.5], confusion={"classes": [WICKED, "b"], "matrix": [[1, 0], [0, 1]]}
    )
    study = write_study(tmp_path / "study", {"accuracy": {WICKED: [0.1], "b": [0.2]}, "baseline": WICKED})
    points_seen = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    source = small_source()
    source.classes, source.name = (WICKED, "b", "c"), WICKED
    seen = Look(
        None, neighbour_strips(points_seen, source, torch.arange(12)), map_of(points_seen, source, torch.arange(12))
    )
    text = page(
        read_runs([stage_one, stage_two, study]), looking=lambda run: seen if run.stage == "pretrain" else Look()
    )
    parsed = Page(text)
    assert [tag for tag, _ in parsed.tags].count("script") == 2
    assert all("onerror" not in attributes for _, attributes in parsed.tags)
    assert all((attributes.get("src") or "data:").startswith("data:") for _, attributes in parsed.tags)
    assert WICKED in "".join(parsed.words)
    assert payload(text)["maps"][0]["classes"][0] == WICKED


def test_a_run_that_is_going_and_one_that_was_killed(tmp_path: Path) -> None:
    folder = write_pretrain(tmp_path / "run", card=False)
    (folder / ".lock").touch()
    with (folder / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (run,) = read_runs([folder])
        assert run.state == "running"
        text = page([run], refresh=7, looking=blind)
        assert payload(text)["refresh"] == 7
        assert "trains small_resnet" in Page(text).text
        fcntl.flock(lock, fcntl.LOCK_UN)
    (run,) = read_runs([folder])
    assert run.state == "stopped"
    assert "was stopped before its end" in Page(page([run], looking=blind)).text


def _without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _with(name: str, content: str | bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(("break_it", "told"), [
    (_with("metrics.jsonl", '{"step": 1, "pretrain/loss": 3.0}\n{"step": 2, "pre'), r"1 broken line\(s\) of metrics.jsonl"),
    (_with("metrics.jsonl", ""), "holds no figure yet"),
    (_with("metrics.jsonl", b"\xff\xfe\x00"), "broken line"),
    (_with("metrics.jsonl", '{"step": 1, "time": "late", "pretrain/loss": 1, "pretrain/lr": [1], "pretrain/epoch": "x"}\n'), "simclr|SimCLR"),
    (_without("metrics.jsonl"), "no figure was logged"),
    (_without("card.json"), "stopped before its end"),
    (_with("card.json", "{"), "card.json is damaged"),
    (_with("card.json", "[]"), "stopped before its end"),
    (_without("run.json"), "—"),
    (_with("run.json", '{"starts": [3, {"started": 5}]}'), "—"),
    (_with("config.yaml", "a: [1"), "config.yaml can't be read"),
    (_with("config.yaml", b"\xff\xfe\x00\x01"), "config.yaml can't be read"),
    (_with("config.yaml", "- 1"), "can't be read"),
    (_with("encoder.safetensors", "x"), "does not understand its config.yaml"),
])  # fmt: skip
def test_a_broken_run_gives_a_page_that_says_so(tmp_path: Path, break_it: Any, told: str) -> None:
    folder = write_pretrain(tmp_path / "run")
    break_it(folder)
    path, _ = report([folder])
    assert re.search(told, Page(path.read_text()).text)


@pytest.mark.parametrize(
    ("figures", "study"), [(3, {}), ([1, {"accuracy": "x"}], {"accuracy": 3}), ([], {"rows": [{}, 1]})]
)
def test_records_of_another_shape_give_a_page(tmp_path: Path, figures: Any, study: Any) -> None:
    folder = write_finetune(tmp_path / "run", [0.5], figures=figures, confusion={"matrix": [[1, 2]]})
    (folder / "domain.json").write_text('{"rows": [3, {"figures": {}}]}')
    report([folder, write_study(tmp_path / "study", study)], tmp_path / "page.html")
    assert "nothing is measured yet" in Page((tmp_path / "page.html").read_text()).text


def test_what_can_not_be_a_report_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for wrong in ("empty", "nowhere"):
        with pytest.raises(ConfigError, match=f"{wrong}' holds no run"):
            report([tmp_path / wrong])
    run = write_pretrain(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"end it in \.html"):
        report([run], tmp_path / "page.txt")
    with pytest.raises(ConfigError, match="there is no folder"):
        report([run], tmp_path / "gone" / "page.html")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "empty")])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2


def test_a_folder_of_runs_stands_for_them_and_each_stands_once(tmp_path: Path) -> None:
    write_pretrain(tmp_path / "one" / "pretrain")
    write_pretrain(tmp_path / "two" / "pretrain")
    runs = read_runs([tmp_path / "one", tmp_path / "two", tmp_path / "one" / "pretrain"])
    assert [run.name for run in runs] == ["one/pretrain", "two/pretrain"]


def test_watching_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pretrain(tmp_path / "run", card=False)
    lock = (folder / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    pages: list[int] = []

    def sleep(seconds: float) -> None:
        pages.append(payload((folder / "report.html").read_text())["refresh"])
        if len(pages) == 2:
            (folder / "card.json").write_text('{"kind": "encoder"}')
        assert seconds == 3

    monkeypatch.setattr("time.sleep", sleep)
    path = watch([folder], None, 3)
    lock.close()
    assert pages == [3, 3]
    assert payload(path.read_text())["refresh"] == 0


def test_the_key_figures_of_both_stages(tmp_path: Path) -> None:
    runs = read_runs([write_pretrain(tmp_path / "one"), write_finetune(tmp_path / "two", [0.7, 0.8, 0.9])])
    text = Page(page(runs, looking=blind)).text
    assert "kNN on dev 70.0 % +20.0 points over untrained" in text
    assert "Stage two 80.0 ± 24.8 % accuracy, LP-FT classification" in text
    assert "Effective rank 60 feature std 0.80" in text
    assert "Time 20 s 1,000 images/s" in text


def test_durations() -> None:
    assert [duration(value) for value in (None, 0.2, 59.6, 130, 3600, 90061)] == ["—", "0 s", "1 min", "2 min 10 s", "1 h", "25 h 1 min"]  # fmt: skip


def test_other_stages_have_nothing_to_look_at(tmp_path: Path) -> None:
    assert look(read_runs([write_finetune(tmp_path / "run", [0.5])])[0]) == Look()
