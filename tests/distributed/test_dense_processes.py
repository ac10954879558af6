"""Masks and boxes on two real processes: training runs, and evaluation counts each image once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssl_pipeline.config.command import load
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.downstream.load_model import load_model
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.transforms.preprocessing import Preprocessing
from tests.ranks import ranks
from tests.shapes import box_folder, mask_folder

DETECTOR = [
    f"downstream.{key}"
    for key in ("width=16", "hidden=16", "rpn_post_nms_top_n=50", "box_batch_size_per_image=16", "score_threshold=0")
]


@pytest.mark.parametrize(
    ("task", "write", "data", "file"),
    [("segmentation", mask_folder, "mask_folder", ""), ("detection", box_folder, "coco", "annotations.json")],
)
def test_training_runs_and_each_image_is_measured_once(
    task: str, write: Callable[..., Path], data: str, file: str, tmp_path: Path
) -> None:
    place = write(tmp_path / "all", 35) / file
    words = [
        "tracking=off", "num_workers=0", f"data={data}", f"data.path={place}", f"downstream={task}", "regime=scratch", "size=32",
        "regime.length=2 steps", "regime.min_steps=0", "regime.batch_size=8", "labels.validation=0", "backbone.width=4",
        *(DETECTOR if task == "detection" else []),
    ]  # fmt: skip
    done = ranks(2, "launch/finetune", *words, f"output={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "run" / "results.json").read_text())["figures"]
    config = load("finetune", FinetuneConfig, words)
    held_out, model = config.data.open("test"), load_model(tmp_path / "run")
    assert held_out is not None
    blueprint = model.card.blueprint
    preprocessing = Preprocessing(blueprint.size, blueprint.mean, blueprint.std)
    alone = model.task.evaluate(held_out, preprocessing, DistInfo(0, 1, torch.device("cpu")))
    assert alone == pytest.approx(found, abs=1e-6)
    assert len(held_out) % 2 == 1  # an image too many would show
