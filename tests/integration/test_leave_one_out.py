"""Leave one domain out: every domain is measured by models that never saw it, and the worst stands beside the mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.report.read import read_runs
from ssl_pipeline.report.tables import domain_table
from ssl_pipeline.study.leave_one_out import LeaveOneOutConfig, study, tabulate
from tests.integration.test_domain_study import COMMON


def tiny(output: Path, **keys: object) -> LeaveOneOutConfig:
    wanted = {
        "common": [*COMMON, "labels.validation=0.2"], "domains": ["original", "edges"], "methods": {"ERM": ["domain=erm"]}, "baseline": "ERM", "seeds": 1,
        "output": str(output),
    }  # fmt: skip
    return LeaveOneOutConfig.model_validate(wanted | keys)


def test_each_domain_is_left_out_once(tmp_path: Path) -> None:
    folder = study(tiny(tmp_path / "study"))
    table = domain_table(read_runs([folder])[0])
    assert table is not None
    assert table.columns == ["method", "trained on", "original", "edges"]
    cells = json.loads((folder / "study.json").read_text())["figures"]["ERM"]
    for name, other in (("original", "edges"), ("edges", "original")):
        figures = cells[name][0]
        assert figures["accuracy"] == figures[f"accuracy/{name}"]
        assert f"accuracy/{other}" in figures  # as a source
        assert "source_validation" in figures


def test_the_worst_domain_is_each_seeds_own() -> None:
    def of(*values: float) -> list[dict[str, float]]:
        return [{"accuracy": value} for value in values]

    cells = {"ERM": {"a": of(0.5, 0.4), "b": of(0.3, 0.6)}, "MixStyle": {"a": of(0.7, 0.6), "b": of(0.5, 0.8)}}
    columns, rows = tabulate(cells, "ERM")
    assert columns == ["method", "a", "b", "mean", "worst domain", "mean against ERM", "verdict (Holm, 1 comparison)"]
    assert rows[0][3].startswith("45.0")
    assert rows[0][4].startswith("35.0")  # of 30 and 40, not the worst of the means
    assert rows[1][5:] == ["+20.0 ± 0.0", "helps"]


def test_the_configuration_that_comes_along_leaves_out_all_four() -> None:
    config = load("study_leave_one_out", LeaveOneOutConfig)
    for method in config.methods:
        found = load("finetune", FinetuneConfig, config.overrides(method, "edges", 0)).domain
        assert found is not None
        assert found.source == ("original", "textured", "inverted")
        assert found.target == ("edges",)
    named = config.model_copy(update={"encoder": "runs/seed-{seed}"}).overrides("ERM", "edges", 2)
    assert named[0] == 'encoder="runs/seed-2"'


def test_one_domain_alone_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`domains` is edges: name two or more different ones"):
        study(tiny(tmp_path / "study", domains=["edges"]))
    with pytest.raises(ConfigError, match="two or more different"):
        study(tiny(tmp_path / "study", domains=["edges", "edges"]))
    with pytest.raises(ConfigError, match="`baseline` 'x'"):
        study(tiny(tmp_path / "study", baseline="x"))
    assert not (tmp_path / "study").exists()
