"""The report of real runs: without labels, before the encoder is there, and when the data has gone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ssl_pipeline.config.base import dump
from ssl_pipeline.data.sources import embedded
from ssl_pipeline.data.splits import Split
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.report.command import report
from ssl_pipeline.report.images import run_images
from ssl_pipeline.report.read import read_runs
from tests.pictures import color_folder
from tests.report_runs import write_pretrain
from tests.runs import tiny_pretrain

COLORS = 60


@pytest.fixture(scope="module")
def unlabeled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of images without classes, and a run on it."""
    root = tmp_path_factory.mktemp("unlabeled")
    (root / "photos").mkdir()
    for file in color_folder(root / "colors").rglob("*.png"):
        file.rename(root / "photos" / f"{file.parent.name}_{file.name}")
    wanted = ["data=folder", f"data.path={root / 'photos'}", "data.val=0.2", "steps=2", "num_workers=0"]
    config = tiny_pretrain(root / "run", *wanted)
    return root / "photos", pretrain(config)


def test_a_run_without_labels_shows_all_that_needs_none(unlabeled: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = unlabeled
    (run,) = read_runs([folder])
    seen = run_images(run)
    assert seen.notes == ()
    assert seen.map is not None
    assert seen.map["labels"] is None
    assert seen.map["images"] == list(range(COLORS))
    assert seen.spectrum is not None
    assert len(seen.spectrum["std"]) > 1
    assert seen.neighbors
    assert seen.neighbors[0]["query"]["label"] is None
    path, _ = report([folder], tmp_path / "page.html")
    assert "Without labels there is no kNN accuracy." in path.read_text()


def test_the_images_are_of_val_and_no_test_image_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pretrain(tiny_pretrain(tmp_path / "run", "steps=1"))
    opened: dict[str, Any] = {}
    real = embedded.Config.open

    def noted(self: embedded.Config, split: Split) -> Any:
        opened[split] = real(self, split)
        return opened[split]

    monkeypatch.setattr(embedded.Config, "open", noted)
    seen = run_images(read_runs([folder])[0])
    assert set(opened) == {"train", "val"}
    assert seen.map is not None
    shown = seen.map["images"]
    assert seen.map["labels"] == opened["val"].labels[shown].tolist()
    assert seen.map["labels"] != opened["train"].labels[shown].tolist()


def test_before_the_encoder_is_there_the_views_are(tmp_path: Path) -> None:
    folder = write_pretrain(tmp_path / "run", card=False)
    config = dump(tiny_pretrain(None, "transform.local_views.count=2", "transform.local_views.size=8"))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    seen = run_images(read_runs([folder])[0])
    assert seen.views is not None
    assert [group["count"] for group in seen.views["groups"]] == [1, 4, 4, 4]
    assert [len(group) for group in seen.views["rows"][0]] == [1, 4, 4, 4]
    assert seen.map is None
    assert "once the run has written its encoder" in seen.notes[0]


def test_data_that_has_gone_and_weights_that_are_damaged_are_told(unlabeled: tuple[Path, Path], tmp_path: Path) -> None:
    photos, folder = unlabeled
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "encoder.safetensors").write_bytes(b"nothing")
    seen = run_images(read_runs([tmp_path / "run"])[0])
    assert seen.views is not None
    assert "can't be shown" in seen.notes[0]
    assert "is damaged" in seen.notes[0]
    moved = photos.rename(photos.with_name("elsewhere"))
    try:
        path, _ = report([folder], tmp_path / "page.html")
    finally:
        moved.rename(photos)
    assert "the data can&#39;t be reached" in path.read_text()
    assert 'id="curves"' in path.read_text()
