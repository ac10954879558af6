"""The study of unknown classes: its splits, its control, and what it can't be asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.metrics.open_set import SCORES
from ssl_pipeline.study.open_set import OpenSetConfig, known_classes, study, tabulate
from tests.integration.test_domain_study import COMMON

ROWS = {
    "trained": ["regime=scratch"],
    "random features": ["init=random", "regime=frozen", "downstream.bottleneck.width=null"],
}


def tiny(output: Path, **keys: object) -> OpenSetConfig:
    wanted = {
        "common": [*COMMON, "domain=source_only"], "source": "original", "rows": ROWS, "baseline": "random features",
        "splits": 2, "output": str(output),
    }  # fmt: skip
    return OpenSetConfig.model_validate(wanted | keys)


def test_every_split_is_of_other_classes_and_oscr_is_at_most_the_accuracy(tmp_path: Path) -> None:
    folder = study(tiny(tmp_path / "study"))
    record = json.loads((folder / "study.json").read_text())
    assert [len(known) for known in record["known"]] == [6, 6]
    assert record["known"][0] != record["known"][1]
    assert list(record["figures"]) == list(ROWS)
    for seeds in record["figures"].values():
        assert len(seeds) == 2
        for figures, known in zip(seeds, record["known"], strict=True):
            assert {n.removeprefix("class_accuracy/") for n in figures if n.startswith("class_accuracy/")} <= set(known)
            assert all(figures[f"open/{score}/oscr"] <= figures["accuracy"] + 1e-6 for score in SCORES)
            assert figures["accuracy"] == figures["accuracy/original"]  # without a target it stays in the source


def test_the_best_score_is_compared_with_the_controls_best() -> None:
    def of(**aurocs: float) -> dict[str, float]:
        plain = {f"open/{score}/{name}": 0.5 for score in SCORES for name in ("auroc", "oscr")}
        return plain | {"accuracy": 0.8} | {f"open/{score}/auroc": value for score, value in aurocs.items()}

    cells = {"trained": [of(msp=0.8, knn=0.7), of(msp=0.9, knn=0.8)], "random": [of(knn=0.6), of(knn=0.7)]}
    columns, rows = tabulate(cells, "random")
    assert columns[2:6] == ["AUROC msp", "AUROC max_logit", "AUROC energy", "AUROC knn"]
    assert rows[0][2].startswith("0.850")
    assert [row[6] for row in rows] == ["msp", "knn"]
    assert rows[0][8:] == ["+0.200 ± 0.000", "helps"]
    assert rows[1][8:] == ["", ""]


def test_splits_are_draws_of_the_classes() -> None:
    classes = tuple("abcdefghij")
    drawn = [known_classes(classes, 6, split) for split in range(5)]
    assert all(known == sorted(known) and len(set(known)) == 6 for known in drawn)
    assert len({tuple(known) for known in drawn}) == 5
    assert known_classes(classes, 6, 3) == drawn[3]


def test_the_configuration_that_comes_along_is_whole() -> None:
    config = load("study_open_set", OpenSetConfig)
    assert config.baseline in config.rows
    known = ["T-shirt/top", "Ankle boot"]
    for row in config.rows:
        found = load("finetune", FinetuneConfig, config.overrides(row, known, 0)).domain
        assert found is not None
        assert found.known == tuple(known)
        assert found.target == ("textured",)


def test_what_leaves_no_class_unknown_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`known` is 10, and there are 10 classes: leave one or more unknown"):
        study(tiny(tmp_path / "study", known=10))
    with pytest.raises(ConfigError, match="`baseline` 'x' is none of the rows"):
        study(tiny(tmp_path / "study", baseline="x"))
    assert not (tmp_path / "study").exists()
