"""The study: a grid of small trainings, each a file, that goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torchvision.models import ResNet18_Weights

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.finetune import finetune
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.logging.jsonl import read_metrics
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import Card, EncoderSpec, save
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.report.charts import label_efficiency
from ssl_pipeline.report.page import page
from ssl_pipeline.report.read import read_runs
from ssl_pipeline.study.grid import StudyConfig, cells
from ssl_pipeline.study.jobs import CellRunner
from ssl_pipeline.study.label_efficiency import StudyTable, initializations_of, study
from tests.report_page import Page, blind

COMMON = ["data=embedded", "data.val=300", "split=val", "regime.min_steps=0"]


def artifact(folder: Path, seed: int) -> Path:
    """An encoder as stage one leaves it, untrained."""
    backbone = BackboneConfig(width=4)
    blueprint = EncoderSpec(backbone=backbone, neck=NeckConfig(), channels=1, size=12, mean=(0.3,), std=(0.3,))
    torch.manual_seed(seed)
    folder.mkdir()
    save(folder, blueprint.build()[0], Card(
        kind="encoder", blueprint=blueprint, config={}, data={}, figures={}, versions={},
    ))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [artifact(root / f"run{i}", i) for i in range(2)]


def words(runs: Sequence[Path], output: Path, *more: str, common: Sequence[str] = ()) -> StudyConfig:
    own = ["labels=[1,5]", "seeds=2", "regimes=[frozen,lp_ft]", "jobs=1", "overrides.lp_ft=['regime.length=2 steps']",
           "overrides.scratch=['regime.length=2 steps']", f"output={output}"]  # fmt: skip
    return load("study", StudyConfig, initializations_of([*map(str, runs), *own, *more, "--", *COMMON, *common]))


@pytest.fixture(scope="module")
def done(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study(words(runs, tmp_path_factory.mktemp("study") / "out", "knn=true", "models=true"))


def test_random_weights_are_trained_once_whatever_the_regimes(runs: list[Path], tmp_path: Path) -> None:
    grid = cells(words(runs, tmp_path, "regimes=[frozen,lp_ft,end_to_end]"))
    assert {name: len(of_init) for name, of_init in grid.items()} == {"random": 8, "run0": 12, "run1": 12}
    assert {cell.row["regime"] for cell in grid["random"]} == {"frozen", "scratch"}
    assert {cell.config.encoder for cell in grid["random"]} == {str(runs[0])}
    assert all(cell.config.starts_fresh for cell in grid["random"])


def test_what_is_written(done: Path) -> None:
    record = json.loads((done / "study.json").read_text())
    assert len(record["rows"]) == 2 * 2 * (2 + 2 + 2)
    assert record["baseline"] == {"init": "random", "regime": "scratch"}
    assert set(record["knn"]) == {"random", "run0", "run1"}
    assert record["summary"] == record["conclusion"][-1]
    assert {row["label_count"] for row in record["rows"]} == {10, 50}
    assert all(0 <= row["figures"]["accuracy"] <= 1 for row in record["rows"])
    assert (done / "study.png").stat().st_size > 10_000
    assert (done / "study.svg").read_text().count("a class") >= 2
    card = json.loads((done / "models" / "run1_lp_ft_5" / "card.json").read_text())
    assert len(card["classes"]) == 10


def test_the_report_shows_all_of_it(done: Path) -> None:
    record = json.loads((done / "study.json").read_text())
    (run,) = read_runs([done])
    shown = Page(page([run], images=blind))
    assert "stage-two" in shown.ids()
    assert all(sentence in shown.text for sentence in record["conclusion"])
    conditions = {(row["init"], row["regime"], row["labels"]) for row in record["rows"]}
    for init, regime, labels in conditions:
        assert f"{init}, {'LP-FT' if regime == 'lp_ft' else regime}, {labels} a class" in shown.text
    (chart,) = label_efficiency([run])
    assert len(chart.lines) == len({condition[:2] for condition in conditions})
    assert all([point.step for point in line.points] == [10, 50] for line in chart.lines)


@pytest.mark.parametrize("regime", ["frozen", "lp_ft"])
def test_a_cell_is_what_finetune_gives(regime: str, done: Path, runs: list[Path], tmp_path: Path) -> None:
    own = ["regime.length=2 steps"] if regime == "lp_ft" else []
    overrides = [*COMMON, f"regime={regime}", *own, "tracking=off", "labels.per_class=5", "seed=1"]
    alone = finetune(load("finetune", FinetuneConfig, [*overrides, f"encoder={runs[1]}", f"output={tmp_path / 'x'}"]))
    cell = json.loads((done / "cells" / f"run1_{regime}_5_1.json").read_text())
    assert cell["figures"] == alone.figures[0]


def test_a_cell_that_learns_without_labels_too_is_what_finetune_gives(runs: list[Path], tmp_path: Path) -> None:
    own = ["unlabeled=consistency", "unlabeled.confidence=0.2", "regime.length=2 steps"]
    config = words(runs[:1], tmp_path / "study", "labels=[5]", "seeds=1", f"overrides.lp_ft={own}")
    cell = json.loads((study(config) / "cells" / "run0_lp_ft_5_0.json").read_text())
    overrides = [*COMMON, *own, "tracking=off", "labels.per_class=5", f"encoder={runs[0]}", f"output={tmp_path / 'x'}"]
    assert cell["figures"] == finetune(load("finetune", FinetuneConfig, overrides)).figures[0]


def test_each_number_of_labels_decides_whether_some_are_held_out(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = study(words(runs[:1], tmp_path / "study", "labels=[1,'20%']", "seeds=1", "regimes=[frozen]"))
    rows = json.loads((folder / "study.json").read_text())["rows"]
    assert {(row["label_count"], row["held_out"]) for row in rows} == {(10, 0), (1540, 308)}
    told = capsys.readouterr().out
    assert "1 (frozen): labels: 10 to learn from, none held out" in told
    assert "20% (frozen): labels: 1232 to learn from, 308 held out" in told


def test_a_study_that_was_stopped_does_what_is_missing(
    done: Path, runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_text() for file in (done / "cells").iterdir()}
    missing = {"run0_frozen_1_1.json", "random_scratch_5_0.json"}
    for name in missing:
        (done / "cells" / name).unlink()
    trained, train = list[str](), CellRunner.train

    def counted(desk: CellRunner, task: Any) -> dict[str, float]:
        trained.append(task.record.name)
        return train(desk, task)

    monkeypatch.setattr(CellRunner, "train", counted)
    monkeypatch.setattr(CellRunner, "read", lambda desk, task: pytest.fail("the features are there"))
    study(words(runs, done, "knn=true", "models=true"))
    assert set(trained) == missing
    for name in before:
        again, first = json.loads((done / "cells" / name).read_text()), json.loads(before[name])
        assert again["figures"] == first["figures"]


def test_more_seeds_complete_it_and_changed_settings_are_named(done: Path, runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`common` was .* and is now"):
        study(words(runs, done, common=["transform.horizontal_flip=0.1"]))
    with pytest.raises(ConfigError, match=r"`overrides.lp_ft` was"):
        study(words(runs, done, "overrides.lp_ft=['regime.length=3 steps']"))
    renamed = tmp_path / "run1"
    artifact(renamed, 7)
    with pytest.raises(ConfigError, match=r"run1_frozen_1_0.json: `weights` was"):
        study(words([runs[0], renamed], done))
    study(words(runs, done, "labels=[1]", "seeds=3", "regimes=[frozen]"))
    assert (done / "cells" / "run1_frozen_1_2.json").is_file()


def test_a_grid_that_grew_finds_what_one_does_that_was_large_at_once(runs: list[Path], tmp_path: Path) -> None:
    own = ["regimes=[frozen]"]
    study(words(runs[:1], tmp_path / "grown", *own, "labels=[1]", "seeds=1"))
    study(words(runs[:1], tmp_path / "grown", *own))
    study(words(runs[:1], tmp_path / "whole", *own))
    files = sorted(file.name for file in (tmp_path / "whole" / "cells").iterdir())
    assert len(files) == 8
    for name in files:
        grown, whole = (
            json.loads((tmp_path / folder / "cells" / name).read_text())["figures"] for folder in ("grown", "whole")
        )
        assert grown == whole, name


def test_what_would_count_twice_or_measure_something_else_is_told(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one stands there twice"):
        words(runs[:1], tmp_path / "x", "labels=[1,1]")
    across = ["data=fashion_domains", "domain=dann", "domain.source=[original]", "domain.target=[edges]"]
    with pytest.raises(ConfigError, match="measures across no domains"):
        cells(words(runs[:1], tmp_path / "x", common=across))


def test_weights_out_of_reach_leave_random_ones_of_what_is_left(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", _unreachable)
    official = "encoders.imagenet='resnet18:IMAGENET1K_V1'"
    small = ["labels=[1]", "seeds=1", "regimes=[frozen]"]
    listed = load("study", StudyConfig, [official, f"encoders.own='{runs[0]}'", *small, "jobs=1",
                                         f"output={tmp_path / 'out'}", "common=[" + ",".join(f"'{text}'" for text in COMMON) + "]"])  # fmt: skip
    record = json.loads((study(listed) / "study.json").read_text())
    assert list(record["left_out"]) == ["imagenet"]
    assert {row["init"] for row in record["rows"]} == {"random", "own"}
    with pytest.raises(ConfigError, match="none of the pretrained `encoders` can be had"):
        study(load("study", StudyConfig, [official, *small, "jobs=1", f"output={tmp_path / 'none'}",
                                          "common=[" + ",".join(f"'{text}'" for text in COMMON) + "]"]))  # fmt: skip
    assert not (tmp_path / "none").exists()


def _unreachable(*_: object, **__: object) -> None:
    raise OSError("no network")


def test_several_processes_find_the_same(done: Path, runs: list[Path], tmp_path: Path) -> None:
    again = study(words(runs[:1], tmp_path / "out", "jobs=2", "labels=[5]", "regimes=[lp_ft]"))
    files = list((again / "cells").iterdir())
    assert len(files) == 4
    for file in files:
        first = json.loads((done / "cells" / file.name).read_text())
        assert json.loads(file.read_text())["figures"] == first["figures"]


def test_a_run_for_each_seed(runs: list[Path], tmp_path: Path) -> None:
    listed = f"encoders.own=['{runs[0]}','{runs[1]}']"
    grid = cells(words([], tmp_path, listed, "labels=[1]", "regimes=[frozen]"))
    assert [cell.config.encoder for cell in grid["own"]] == [str(run) for run in runs]
    with pytest.raises(ConfigError, match="lists 2 run\\(s\\) and `seeds` is 3"):
        cells(words([], tmp_path, listed, "seeds=3"))
    study(words([], tmp_path / "out", listed, "labels=[1]", "regimes=[frozen]"))
    notes = json.loads((tmp_path / "out" / "study.json").read_text())["notes"]
    assert notes == ["Of own each seed has a run of stage one of its own, so the intervals hold its chance too."]


def test_official_weights_that_cannot_be_had_are_left_out_with_a_word(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", offline)
    own = ["encoders.imagenet='resnet18:IMAGENET1K_V1'", "labels=[1]", "regimes=[frozen]"]
    folder = study(words(runs[:1], tmp_path / "out", *own))
    record = json.loads((folder / "study.json").read_text())
    assert "can't be downloaded" in record["left_out"]["imagenet"]
    assert {row["init"] for row in record["rows"]} == {"random", "run0"}
    assert "imagenet is left out" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="there is no file"):
        study(words([], tmp_path / "other", "encoders.file=resnet18:nowhere.pth"))


def test_too_few_labels_and_unknown_counts_are_told_before_anything_is_written(
    runs: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="has only"):
        study(words(runs, tmp_path / "out", "labels=[10,9000]"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="is no number of labels"):
        words(runs, tmp_path, "labels=[many]")


@pytest.mark.parametrize(
    ("gains", "word"),
    [
        ((0.10, 0.11, 0.12), "brought a gain"),
        ((0.1, -0.1, 0.0), "no gain beyond chance"),
        ((-0.1, -0.11, -0.12), "did harm"),
    ],
)
def test_the_verdict_is_paired_by_seed(gains: tuple[float, ...], word: str, runs: list[Path], tmp_path: Path) -> None:
    # Seeds differ among themselves far more than the conditions do: only pairing can tell.
    rows = [
        {"init": init, "regime": regime, "labels": 5, "seed": seed, "figures": {"accuracy": 0.3 * seed + own}}
        for seed, gain in enumerate(gains)
        for init, regime, own in (("random", "scratch", 0.2), ("run0", "lp_ft", 0.2 + gain))
    ]
    findings = StudyTable(rows, words(runs[:1], tmp_path, "seeds=3"), in_percent=True)
    assert word in findings.sentences()[-1]


def test_verdicts_of_a_study_are_corrected_for_their_number(runs: list[Path], tmp_path: Path) -> None:
    rows = [
        {"init": init, "regime": regime, "labels": labels, "seed": seed, "figures": {"accuracy": 0.3 * seed + own}}
        for labels, gains in ((5, (0.10, 0.14, 0.06)), (10, (0.0, 0.1, -0.1)))  # of the first p = 0.049
        for seed, gain in enumerate(gains)
        for init, regime, own in (("random", "scratch", 0.2), ("run0", "lp_ft", 0.2 + gain))
    ]
    config = words(runs[:1], tmp_path, "seeds=3")
    alone = StudyTable([row for row in rows if row["labels"] == 5], config, in_percent=True).sentences()
    assert "brought a gain" in alone[-1]
    both = StudyTable(rows, config, in_percent=True).sentences()
    assert "verdict corrected for 2 comparisons by Holm): no gain beyond chance" in both[0]
    assert "gain (" not in both[-1]


def test_a_study_is_one_run_of_the_mirrors(done: Path, runs: list[Path], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert not (done / "metrics.jsonl").exists()
    output = tmp_path / "out"
    shutil.copytree(done, output)
    study(words(runs, output, "knn=true", "models=true", "tracking=tensorboard"))
    record = json.loads((output / "study.json").read_text())
    rows = [row for row in record["rows"] if (row["init"], row["regime"], row["labels"]) == ("run0", "lp_ft", 5)]
    mean = sum(row["figures"]["accuracy"] for row in rows) / len(rows)
    told = {line["step"]: line["study/run0_lp_ft"] for line in read_metrics(output) if "study/run0_lp_ft" in line}
    assert told[50] == pytest.approx(mean)
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars("study/run0_lp_ft")} == pytest.approx(told, rel=1e-6)
    assert [e.step for e in events.Images("media/label_efficiency")] == [50]
