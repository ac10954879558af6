"""Sweeps and the dashboard speak of keys that the schema knows and of figures that a run logs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.config.compose import choices
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.logging import dashboard
from ssl_pipeline.pretrain_config import PretrainConfig

ROOT = Path(__file__).parents[2]
STAGES: dict[str, Any] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
DOCUMENTED = set(re.findall(r"^\| `(\w+/\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
SWEEPS = sorted((ROOT / "launch" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_a_sweep_turns_real_keys_and_looks_at_val(path: Path) -> None:
    sweep: Any = OmegaConf.to_container(OmegaConf.create(path.read_text().replace("${args_no_hyphens}", "ARGUMENTS")))
    program, stage, arguments = sweep["command"]
    assert (program, arguments) == ("ssl-pipeline", "ARGUMENTS")
    values = {key: given.get("values", [given.get("value")]) for key, given in sweep["parameters"].items()}
    assert sum(len(found) > 1 for found in values.values()) == 2
    for number in range(max(map(len, values.values()))):
        chosen = {key: found[number % len(found)] for key, found in values.items()}
        # As W&B's agent writes them: KEY=VALUE, without hyphens.
        config = load(stage, STAGES[stage], [f"{key}={value}" for key, value in chosen.items()])
        for key, value in chosen.items():
            if key in ("recipe", "regime"):
                assert value in choices(key)
                continue
            found: Any = config
            for part in key.split("."):
                found = getattr(found, part)
            assert found == value, key
    assert sweep["metric"]["name"] in DOCUMENTED
    assert not sweep["metric"]["name"].startswith("test/")


# wandb-workspaces still has validators of pydantic's first version.
of_workspaces = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@of_workspaces
def test_the_dashboard_shows_what_runs_log() -> None:
    model = dashboard.build("team", "project")._to_model()
    text = model.model_dump_json(by_alias=True)
    names = [section.name for section in model.spec.section.panel_bank_config.sections]
    assert names == [
        "pretrain",
        "eval",
        "temperature",
        "finetune",
        "system",
        "media",
        "finetune on test",
        "finetune on val",
    ]
    shown = set(re.findall(r"\b(?:pretrain|eval|temperature|finetune|system|media|test|val)/\w+", text))
    assert shown <= DOCUMENTED
    of_no_curve = {
        "system/bad_files", "pretrain/queue", "pretrain/prototypes_used", "pretrain/nonfinite_steps", "pretrain/skipped_steps",
        "study/pretrained_lp_ft", "media/label_efficiency", "finetune/epoch", "finetune/accuracy", "finetune/validation_class_mean_accuracy",
    }  # fmt: skip
    per_class = {f"{split}/class_mean_accuracy" for split in dashboard.SPLITS}
    untrained = {name for name in DOCUMENTED if name.startswith("untrained/")}
    assert shown == DOCUMENTED - of_no_curve - per_class - untrained
    assert "labels.per_class" in text or "labels.value.per_class" in text


@pytest.mark.parametrize(
    ("project", "told"),
    [("team", "is no project: write ENTITY/PROJECT"), ("team/project", "can't be saved")],
)
def test_the_dashboard_tells_what_is_wrong(tmp_path: Path, project: str, told: str) -> None:
    environment = {"HOME": str(tmp_path), "PATH": "", "PYTHONPATH": str(ROOT), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    words = [sys.executable, "-m", "ssl_pipeline.cli", "dashboard", project]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@of_workspaces
def test_the_dashboard_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ConfigError, match=r"\.\[dashboard\]"):
        dashboard.build("team", "project")
