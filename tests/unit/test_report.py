"""The report against the files that it reads: each curve, map and setting, and nothing that escapes its place."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.evaluation.plots import pca_projection, to_unit_square, tsne_projection
from ssl_pipeline.report.charts import Chart, Line, Point, logged, points, thin
from ssl_pipeline.report.command import ImagesCache
from ssl_pipeline.report.images import RunImages, map_of, neighbor_strips, run_images, spectrum
from ssl_pipeline.report.page import page
from ssl_pipeline.report.read import RunRecord, read_runs
from ssl_pipeline.report.summary import summary
from ssl_pipeline.report.svg import draw_chart, smooth
from ssl_pipeline.report.tables import difference, duration, system
from tests.report_page import Page, blind, curves
from tests.report_runs import write_finetune, write_pretrain, write_study


def test_curves_are_what_was_logged(tmp_path: Path) -> None:
    run = read_runs([write_pretrain(tmp_path / "run")])[0]
    by_key = {chart.key: chart.lines[0].points for chart in logged([run])}
    assert {"loss", "knn", "lr", "images_per_s", "data_wait", "temperature", "entropy_share", "hardest_1pct", "feature_std",
            "effective_rank"} == set(by_key)  # fmt: skip
    # Step, epoch, seconds and value; the evaluation's own "loss" is none of the pretext task's.
    assert by_key["loss"][3] == Point(4, 0.4, 4.0, 2.5)
    assert [row.value for row in by_key["loss"]] == [pytest.approx(10 / step, rel=1e-5) for step in range(1, 21)]
    assert [row.value for row in by_key["knn"]] == [0.5, 0.6, 0.7]
    assert [row.step for row in by_key["knn"]] == [0, 10, 20]
    text = page([run], images=blind)
    for axis in ("step", "epoch", "time"):
        assert curves(text, "loss", 0, axis) == [20]
        assert curves(text, "knn", 0, axis) == [3]


def test_the_group_that_a_figure_is_logged_in_does_not_matter(tmp_path: Path) -> None:
    folder = write_pretrain(tmp_path / "run")
    before = logged(read_runs([folder]))
    text = (folder / "metrics.jsonl").read_text()
    for old, new in (("pretrain/temperature", "temperature/tau"), ("pretrain/entropy_share", "temperature/entropy_share"),
                     ("pretrain/images_per_s", "system/images_per_s")):  # fmt: skip
        text = text.replace(old, new)
    (folder / "metrics.jsonl").write_text(text)
    assert logged(read_runs([folder])) == before


def test_a_figure_that_is_no_number_is_a_gap(tmp_path: Path) -> None:
    folder = write_pretrain(tmp_path / "run", steps=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "time": 1767323048.0, "pretrain/loss": "nan"}\n')
    run = read_runs([folder])[0]
    assert points(run, ("loss",), step_only=True)[-1] == Point(3, 0.3, 3.0, None)
    assert curves(page([run], images=blind), "loss", 0) == [2]


@given(st.integers(1, 5000), st.integers(2, 700))
def test_thinning_keeps_both_ends_and_the_order(count: int, most: int) -> None:
    rows = [Point(float(i), None, None, 0.0) for i in range(count)]
    kept = thin(rows, most)
    assert kept[0] == rows[0]
    assert kept[-1] == rows[-1]
    assert len(kept) <= most + 1
    assert kept == sorted(kept)
    assert len({row.step for row in kept}) == len(kept)


def test_the_sentence_of_stage_one(tmp_path: Path) -> None:
    told = " ".join(summary(read_runs([write_pretrain(tmp_path / "run")])[0]))
    assert told.startswith("SimCLR trained small_resnet on embedded for 20 steps in 20 s.")
    assert "kNN accuracy on val rose from 50.0 % untrained to 70.0 %." in told
    assert "did not collapse: std 0.80, effective rank 60" in told


def test_a_collapse_is_told(tmp_path: Path) -> None:
    folder = write_pretrain(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "eval/feature_std": 0.01, "eval/effective_rank": 1.0, "eval/knn": 0.1}\n')
    told = " ".join(summary(read_runs([folder])[0]))
    assert "have collapsed" in told
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 22, "eval/feature_std": 0.3, "eval/effective_rank": 1.2}\n')
    few = " ".join(summary(read_runs([folder])[0]))
    assert "onto few directions (effective rank 1.2)." in few  # of how many, the run's files do not say
    assert "kNN accuracy on val fell from 50.0 % untrained to 10.0 %" in told


def test_only_the_settings_that_differ(tmp_path: Path) -> None:
    runs = read_runs([write_pretrain(tmp_path / "a"), write_pretrain(tmp_path / "b", temperature=0.5, extra=None)])
    table = difference(runs)
    assert table
    assert table.rows == [["extra", "—", "null"], ["pretext.temperature.value", "0.1", "0.5"]]
    assert difference(runs[:1]) is None
    alike = read_runs([tmp_path / "a", write_pretrain(tmp_path / "c"), write_finetune(tmp_path / "d", [0.5])])
    assert "No setting differs" in page(alike, images=blind)
    assert "No setting differs" not in page(alike[1:], images=blind)  # stages have no settings to compare


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
    plane, variance = pca_projection(features)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    values, vectors = torch.linalg.eigh(torch.cov(unit.T, correction=0))
    expected = (unit - unit.mean(0)) @ vectors[:, [-1, -2]]
    assert torch.allclose(plane.abs(), expected.abs(), atol=1e-10)
    assert torch.allclose(variance, values[[-1, -2]] / values.sum())


def test_neighbors_stay_together_on_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    group = torch.arange(120) % 3
    features = torch.eye(3, 16)[group] * 4 + torch.randn(120, 16)
    plane = tsne_projection(features)
    assert plane is not None
    nearest = torch.cdist(plane, plane).fill_diagonal_(torch.inf).argmin(1)
    assert (group[nearest] == group).float().mean() > 0.95
    again = tsne_projection(features)
    assert again is not None
    assert torch.equal(plane, again)
    assert tsne_projection(torch.ones(120, 16)) is None  # collapsed
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)  # not installed
    assert tsne_projection(features) is None


def small_source(count: int = 12) -> ArrayDataset:
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].mul(20).expand(count, 1, 8, 8).contiguous()
    return ArrayDataset("small", pixels, torch.arange(count) % 3, ("a", "b", "c"))


def test_neighbors_are_the_nearest_by_brute_force() -> None:
    torch.manual_seed(2)
    features, source, index = torch.randn(12, 5), small_source(), torch.arange(12)
    strips = neighbor_strips(features, source, index)
    unit = torch.nn.functional.normalize(features, dim=1)
    for strip in strips:
        query = int(strip["query"]["name"].removeprefix("image "))
        order = (unit @ unit[query]).argsort(descending=True).tolist()
        order.remove(query)
        assert [near["name"] for near in strip["near"]] == [f"image {i}" for i in order[:7]]
        assert [near["same"] for near in strip["near"]] == [i % 3 == query % 3 for i in order[:7]]
    assert [strip["query"]["label"] for strip in strips[:3]] == ["a", "b", "c"]


def test_the_map_has_a_dot_for_each_image_and_thumbnails_that_hide_no_other() -> None:
    torch.manual_seed(3)
    features = torch.randn(12, 5)
    found = map_of(features, small_source(), torch.arange(12), "run")
    assert found
    (layout,) = found["layouts"]
    assert found["labels"] == [i % 3 for i in range(12)]
    for label in range(3):
        assert layout["svg"].count(f"fill: var(--class-{label})") >= 4
    places = to_unit_square(pca_projection(features)[0])
    assert 1 <= layout["svg"].count("<image") <= len(places)
    assert map_of(torch.randn(2, 5), small_source(2), torch.arange(2), "run") is None


def test_a_chart_has_gaps_whiskers_and_the_colors_of_the_page() -> None:
    rows = [Point(1, None, None, 0.25, 0.1, 0.4), Point(2, None, None, None), Point(3, None, None, 0.5)]
    chart = Chart("x", "stage-two", "X", (), "percent", "", axis="labels", lines=[Line(rows, name="<b>")])
    text = draw_chart(chart, "labels")
    assert "#c0d" not in text
    assert "#c0e" not in text
    assert text.count("var(--run-0)") >= 2
    assert "<b>" not in text
    assert draw_chart(chart, "epoch") == ""


def test_smoothing_starts_unbiased_and_keeps_gaps() -> None:
    assert smooth([2.0, 2.0, float("nan"), 2.0], 0.9)[::3] == pytest.approx([2.0, 2.0])
    first, second, third = smooth([1.0, float("nan"), 3.0], 0.5)
    assert first == 1.0
    assert third == pytest.approx((0.5 * 0.5 * 1 + 0.5 * 3) / 0.75)
    assert second != second


WICKED = '"><script>alert(1)</script></script><img src=x onerror=alert(1)>&amp;'


def test_nothing_that_a_run_says_becomes_markup(tmp_path: Path) -> None:
    stage_one = write_pretrain(tmp_path / "run", note=WICKED, pretext={"name": WICKED, "temperature": {"value": 1}})
    stage_two = write_finetune(
        tmp_path / "two", [0.5], confusion={"classes": [WICKED, "b"], "matrix": [[1, 0], [0, 1]]}
    )
    rows = [
        {"init": init, "regime": "lp_ft", "labels": WICKED, "seed": 0, "figures": {WICKED: 0.1}}
        for init in (WICKED, "b")
    ]
    study = write_study(
        tmp_path / "study", {"rows": rows, "baseline": {"init": WICKED, "regime": "lp_ft"}, "split": WICKED}
    )
    points_seen = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    source = small_source()
    source.classes, source.name = (WICKED, "b", "c"), WICKED
    seen = RunImages(
        None,
        neighbor_strips(points_seen, source, torch.arange(12)),
        map_of(points_seen, source, torch.arange(12), WICKED),
    )
    text = page(
        read_runs([stage_one, stage_two, study]), images=lambda run: seen if run.stage == "pretrain" else RunImages()
    )
    parsed = Page(text)
    assert [tag for tag, _ in parsed.tags].count("script") == 0
    assert all("onerror" not in attributes for _, attributes in parsed.tags)
    assert all((attributes.get("src") or "data:").startswith("data:") for _, attributes in parsed.tags)
    assert WICKED in "".join(parsed.words)
    assert any(WICKED in (attributes.get("aria-label") or "") for tag, attributes in parsed.tags if tag == "svg")


def test_the_key_figures_of_both_stages(tmp_path: Path) -> None:
    runs = read_runs([write_pretrain(tmp_path / "one"), write_finetune(tmp_path / "two", [0.7, 0.8, 0.9])])
    text = Page(page(runs, images=blind)).text
    assert "kNN on val 70.0 % +20.0 points over untrained" in text
    assert "Stage two 80.0 ± 24.8 % accuracy, LP-FT classification" in text
    assert "Effective rank 60 feature std 0.80" in text
    assert "Time 20 s 1,000 images/s" in text


def test_a_run_that_was_continued_began_at_its_first_start_and_runs_on_what_its_last_one_found(tmp_path: Path) -> None:
    folder = write_pretrain(tmp_path / "run")
    (first,) = json.loads((folder / "run.json").read_text())["starts"]
    second = {
        **first,
        "started": "2026-01-03T00:00:00+00:00",
        "command": ["pretrain", "again"],
        "threads": 5,
        "device": "cuda",
    }
    (folder / "run.json").write_text(json.dumps({"starts": [first, second]}))
    told = {row[0]: row[1] for row in system(read_runs([folder])).rows}
    assert told["started"] == "2026-01-02 03:04 UTC"
    assert told["duration"] == "20 s"
    assert (told["starts"], told["command"], told["threads"], told["device"]) == ("2", "pretrain again", "5", "cuda")


def test_a_page_that_is_written_again_looks_at_new_weights_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = list[Path]()

    def counted(run: RunRecord) -> RunImages:
        looked.append(run.folder)
        return RunImages(notes=(f"look {len(looked)}",))

    monkeypatch.setattr("ssl_pipeline.report.command.run_images", counted)
    folders = [write_pretrain(tmp_path / name) for name in ("a", "b")]
    weights = folders[0] / "encoder.safetensors"
    looks = ImagesCache()

    def notes() -> list[str]:
        return [looks(run).notes[0] for run in read_runs(folders)]

    assert notes() == notes() == ["look 1", "look 2"]
    weights.touch()
    assert notes() == notes() == ["look 3", "look 2"]
    os.utime(weights, (1, 1))  # written anew, such as by a run that was continued
    assert notes() == notes() == ["look 4", "look 2"]
    assert looked == [folders[0], folders[1], folders[0], folders[0]]


def test_many_runs_have_their_folders_name_and_a_table(tmp_path: Path) -> None:
    folder = tmp_path / "temperatures"
    for number in range(4):
        write_pretrain(folder / f"tau-{number}", temperature=0.1 * (number + 1))
    write_finetune(folder / "two", [0.5, 0.7])
    text = page(read_runs([folder]), images=lambda run: RunImages())
    assert "<h1>temperatures</h1>" in text
    assert "<title>temperatures</title>" in text
    head = text[: text.index("<nav")]
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', head)
    assert [name for name, _ in rows] == ["tau-0", "tau-1", "tau-2", "tau-3", "two"]
    cells = [re.findall("<td>(.*?)</td>", found) for _, found in rows]
    assert cells[0] == ["pretrain", "finished", "20", "20 s", "kNN on val, untrained → now", "50.0 → 70.0 %"]
    assert cells[4][:3] == ["finetune", "finished", "—"]
    assert cells[4][4:] == ["accuracy", "60.0 ± 127.1 %"]
    assert head.count('class="sentence"') == 5  # what each found, in words, is there to be opened
    few = page(read_runs([folder / "tau-0", folder / "two"]), images=lambda run: RunImages())
    assert "<h1>tau-0, two</h1>" in few
    assert "Each run in words" not in few


def test_durations() -> None:
    assert [duration(value) for value in (None, 0.2, 59.6, 130, 3600, 90061)] == ["—", "0 s", "1 min", "2 min 10 s", "1 h", "25 h 1 min"]  # fmt: skip


def test_other_stages_have_nothing_to_look_at(tmp_path: Path) -> None:
    assert run_images(read_runs([write_finetune(tmp_path / "run", [0.5])])[0]) == RunImages()
