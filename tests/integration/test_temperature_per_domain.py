"""A temperature per domain, from a folder of domains to the loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_pipeline.logging.jsonl import read_metrics
from ssl_pipeline.pretrain import pretrain
from tests.runs import tiny_pretrain


def test_the_domains_of_a_folder_reach_the_loss(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(48):
        place = tmp_path / "images" / ("sketch", "photo")[number % 2] / ("cat", "dog")[number // 2 % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (14, 14, 3), dtype=np.uint8)).save(place / f"{number}.png")
    losses = []
    for name, words in (("one", []), ("same", ["0.5"]), ("two", ["2.0"])):
        overrides = [f"pretext.temperature.other_domain={value}" for value in words]
        config = tiny_pretrain(
            tmp_path / name, "data=domain_folder", f"data.path={tmp_path / 'images'}", "data.val=0.1", "batch_size=16",
            "steps=1", "num_workers=0", *overrides,
        )  # fmt: skip
        losses.append(read_metrics(pretrain(config))[-1]["pretrain/loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # 0.5 within and across the domains is 0.5
    assert abs(losses[2] - losses[0]) > 0.01
