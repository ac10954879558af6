"""``ssl-pipeline plot-temperature``: the example alone, and with a real run beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.study.plot_temperature import draw
from tests.runs import tiny_pretrain


def test_the_example_and_a_run(tmp_path: Path) -> None:
    run = pretrain(tiny_pretrain(tmp_path / "run", "pretext.temperature.value=0.2"))
    alone, both = draw(None, tmp_path / "alone.svg"), draw(run, tmp_path / "both.svg")
    assert "<svg" in alone.read_text()
    # Each curve is a path: four at all temperatures, and five along the run's steps.
    assert both.read_text().count('<path d="M') > alone.read_text().count('<path d="M') + 9


def test_a_wrong_ending_and_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"end it in \.svg"):
        draw(None, tmp_path / "picture.txt")
    with pytest.raises(ConfigError):
        draw(tmp_path, tmp_path / "picture.svg")
    assert not (tmp_path / "picture.svg").exists()
