"""What stage one learns from: all images that are not test, and no label of those that serve choices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.source import SourceConfig, describe_splits, open_training
from ssl_pipeline.data.sources import domain_folder, embedded, fashion_domains, folder, mask_folder, table
from ssl_pipeline.data.splits import Split

SPLITS: tuple[Split, ...] = ("train", "val", "test")


def pictures(*folders: Path, count: int = 20) -> None:
    for place in folders:
        place.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (6, 5), (i, 0, 0)).save(place / f"{i}.png")


def names(source: IndexedDataset | None) -> set[str]:
    assert source is not None
    return {source.describe(i) for i in range(len(source))}


def class_folders(root: Path, above: tuple[str, ...] = ("",)) -> SourceConfig:
    pictures(*(root / part / kind for part in above for kind in ("cat", "dog")))
    return folder.Config(name="folder", path=str(root))


def own_val(root: Path) -> SourceConfig:
    return class_folders(root, ("train", "val", "test"))


def domains(root: Path) -> SourceConfig:
    pictures(*(root / domain / kind for domain in ("ink", "oil", "pen") for kind in ("cat", "dog")))
    return domain_folder.Config(name="domain_folder", path=str(root), test_domains=("pen",))


def rows(root: Path) -> SourceConfig:
    pictures(root)
    lines = "".join(f"{i}.png,{'ab'[i % 2]},{'xyz'[i % 3]}\n" for i in range(20))
    (root / "t.csv").write_text("path,label,domain\n" + lines)
    return table.Config(name="table", path=str(root / "t.csv"), domains=("x", "y"))


def masks(root: Path) -> SourceConfig:
    pictures(root / "images")
    (root / "masks").mkdir()
    for i in range(20):
        Image.fromarray(np.full((5, 6), i % 2, np.uint8)).save(root / "masks" / f"{i}.png")
    return mask_folder.Config(name="mask_folder", path=str(root))


@pytest.mark.parametrize("make", [class_folders, own_val, domains, rows, masks])
def test_stage_one_learns_from_all_that_is_not_test(tmp_path: Path, make: Any) -> None:
    config: SourceConfig = make(tmp_path)
    train, val, test = (names(config.open(split)) for split in SPLITS)
    pool = open_training(config)
    assert isinstance(pool, IndexedDataset)
    assert names(pool) == (train if make is own_val else train | val)
    assert not names(pool) & test
    assert len(pool) == len(names(pool))


@pytest.mark.parametrize("make", [class_folders, domains, rows])
def test_labels_of_images_that_serve_choices_are_not_among_those_learned_from(tmp_path: Path, make: Any) -> None:
    config: SourceConfig = make(tmp_path)
    pool, train, val = open_training(config), config.open("train"), config.open("val")
    assert isinstance(pool, IndexedDataset)
    assert pool.labels is not None
    assert train is not None
    assert train.labels is not None
    labels = {pool.describe(i): label for i, label in enumerate(pool.labels.tolist())}
    assert {labels[name] for name in names(val)} == {-1}
    assert [labels[train.describe(i)] for i in range(len(train))] == train.labels.tolist()


@pytest.mark.parametrize("config", [embedded.Config(name="embedded"), fashion_domains.Config(name="fashion_domains")])
def test_the_embedded_data_keeps_its_protocol(config: SourceConfig) -> None:
    pool, train = open_training(config), config.open("train")
    assert train is not None
    assert pool.fingerprint() == train.fingerprint()


@pytest.mark.parametrize(
    ("make", "told"),
    [(class_folders, "learned from: 32 images; for choices (`val`): 3 of these, by their labels; held out for `test`: 8"),
     (own_val, "learned from: 40 images; for choices (`val`): 40, held out; held out for `test`: 40")],
)  # fmt: skip
def test_the_split_is_told_in_a_line(tmp_path: Path, make: Any, told: str) -> None:
    config: SourceConfig = make(tmp_path)
    assert describe_splits(config, open_training(config), config.open("val")) == told


def test_a_flat_folder_is_learned_from_whole(tmp_path: Path) -> None:
    pictures(tmp_path)
    config = folder.Config(name="folder", path=str(tmp_path))
    pool = open_training(config)
    assert isinstance(pool, IndexedDataset)
    assert len(pool) == 20
    assert describe_splits(config, pool, None).startswith("learned from: 20 images; there is no `val`")


@pytest.mark.parametrize("split_column", [False, True])
def test_every_image_is_found_where_there_are_no_labels(tmp_path: Path, split_column: bool) -> None:
    pictures(tmp_path / "train", tmp_path / "test")
    config: SourceConfig = folder.Config(name="folder", path=str(tmp_path))
    if split_column:
        lines = "".join(f"{part}/{i}.png,{part}\n" for part in ("train", "test") for i in range(20))
        (tmp_path / "t.csv").write_text("path,split\n" + lines)
        config = table.Config(name="table", path=str(tmp_path / "t.csv"))
    assert {split: len(source) for split, source in config.open_every().items()} == {"train": 20, "test": 20}
