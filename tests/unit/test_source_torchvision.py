"""torchvision's datasets by name, on folders laid out as torchvision lays them out."""

from __future__ import annotations

import hashlib
import inspect
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.dataset import ArrayDataset, IndexedDataset
from ssl_pipeline.data.image_files import FileDataset
from ssl_pipeline.data.sources import torchvision
from tests.embedded_subset import write_idx
from tests.shards import png


def opened(dataset: str, split: Any = "train", **keys: Any) -> IndexedDataset:
    source = torchvision.Config(name="torchvision", dataset=dataset, **keys).open(split)
    assert source is not None
    return source


def labels(source: IndexedDataset) -> list[int]:
    assert source.labels is not None
    return source.labels.tolist()


def test_fake_data_is_held_out_and_labeled() -> None:
    options = {"size": 50, "image_size": (3, 9, 8), "num_classes": 3}
    parts = [opened("FakeData", split, options=options) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [36, 4, 10]
    made = datasets.FakeData(size=50, image_size=(3, 9, 8), num_classes=3)
    pictures = {np.asarray(image).tobytes(): label for image, label in (made[i] for i in range(50))}
    for part in parts:
        assert part.channels == 3
        assert part.classes == ("0", "1", "2")
        assert [pictures[np.asarray(part.open_image(i)).tobytes()] for i in range(len(part))] == labels(part)
    assert len({part.fingerprint() for part in parts}) == 3
    assert opened("FakeData", options=options, channels=1).open_image(0).mode == "L"


def test_images_in_memory_are_taken_as_they_are(tmp_path: Path) -> None:
    raw = tmp_path / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    images = torch.randint(0, 256, (60, 28, 28), dtype=torch.uint8)
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", (torch.arange(60) % 10).to(torch.uint8))
    train, val, test = (
        opened("KMNIST", split, path=str(tmp_path), license="free") for split in ("train", "val", "test")
    )
    assert isinstance(train, ArrayDataset)
    assert [len(train), len(val), len(test)] == [54, 6, 60]
    assert train.license == "free"
    assert test.pixels is not None
    assert torch.equal(test.pixels[:, 0], images)
    assert test.mean == train.mean is not None


def test_cifar_as_torchvision_stores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / datasets.CIFAR10.base_folder
    folder.mkdir()
    files = {}
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        pixels = np.arange(20 * 3072, dtype=np.uint32).astype(np.uint8).reshape(20, 3072)
        content = (
            {"label_names": list("abcdefghij")}
            if name == "batches.meta"
            else {"data": pixels, "labels": [i % 10 for i in range(20)]}
        )
        (folder / name).write_bytes(pickle.dumps(content))
        files[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", files["data_batch_1"]]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", files["test_batch"]]])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": files["batches.meta"]}
    )
    test = opened("CIFAR10", "test", path=str(tmp_path))
    assert test.pixels is not None
    assert test.pixels.shape == (20, 3, 32, 32)
    assert test.pixels[0, 1, 0, :3].tolist() == [0, 1, 2]  # the second plane begins at 1024, which is 0 in 8 bits
    assert test.classes == tuple("abcdefghij")
    (folder / "data_batch_1").write_bytes(b"other bytes")
    torchvision._part.cache_clear()
    with pytest.raises(ConfigError, match=r"CIFAR10 can't be read .*not found or corrupted.*`data\.download=true`"):
        opened("CIFAR10", path=str(tmp_path))


def test_folders_become_files(tmp_path: Path) -> None:
    for i in range(20):
        path = tmp_path / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(i))
    source = opened("ImageFolder", path=str(tmp_path))
    assert isinstance(source, FileDataset)
    assert source.classes == ("cat", "dog")
    assert source.channels == 3
    assert all(source.files[i].split("/")[0] == ("cat", "dog")[label] for i, label in enumerate(labels(source)))
    assert source.open_image(0).mode == "RGB"


def test_parts_have_torchvisions_names(tmp_path: Path) -> None:
    for split, count in (("train", 30), ("val", 10)):
        for i in range(count):
            path = tmp_path / "imagenette2" / split / ("n01440764", "n02102040")[i % 2] / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, i, i)).save(path)
    parts = [opened("Imagenette", split, path=str(tmp_path)) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [27, 3, 10]
    assert parts[0].classes is not None
    assert parts[0].classes[0] == "tench / Tinca tinca"
    assert set(labels(parts[2])) == {0, 1}
    chosen = [opened("Imagenette", split, path=str(tmp_path), options={"split": "val"}) for split in ("train", "test")]
    assert [len(part) for part in chosen] == [7, 2]


@pytest.mark.parametrize("name", torchvision.DATASETS)
def test_every_part_is_an_argument_that_torchvision_takes(name: str) -> None:
    parameters = inspect.signature(getattr(datasets, name)).parameters
    for value in torchvision.DATASETS[name].values():
        key = "split" if isinstance(value, str) else "train"
        assert key in parameters or "kwargs" in parameters
        if isinstance(value, str):
            assert f'"{value}"' in inspect.getsource(getattr(datasets, name))


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'CIFAR-10'.*Did you mean `data\.dataset=CIFAR10`"):
        opened("CIFAR-10")
    with pytest.raises(ConfigError, match=r"Did you mean `data\.dataset=Flowers102`"):
        opened("flowers101")
    with pytest.raises(
        ConfigError, match=r"'CocoDetection' is no dataset of torchvision with one class per image\. Known: C"
    ):
        opened("CocoDetection")
    with pytest.raises(ConfigError, match=r"takes no 'sizes'; it takes size"):
        opened("FakeData", options={"sizes": 3})
    with pytest.raises(ConfigError, match="can't fetch FakeData"):
        opened("FakeData", download=True)
    with pytest.raises(ConfigError, match=r"EMNIST can't be read .*split"):
        opened("EMNIST", path=str(tmp_path))
    with pytest.raises(ConfigError, match="has no images"):
        opened("FakeData", options={"size": 0})
    with pytest.raises(ConfigError, match=r"STL10 can't be read .*`data\.download=true`"):
        opened("STL10", path=str(tmp_path))
