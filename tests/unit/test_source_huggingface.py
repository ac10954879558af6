"""Hugging Face's datasets from local files, whole and streamed."""

from __future__ import annotations

import io
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data import hf_dataset
from ssl_pipeline.data.decode import DecodeError
from ssl_pipeline.data.hf_dataset import HFDataset, HFIterableDataset, encoded
from ssl_pipeline.data.loader import DistInfo, IndexedLoader, read_crops
from ssl_pipeline.data.sources import huggingface
from ssl_pipeline.data.stream_loader import StreamLoader, sample_id
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.multi_view import Views
from tests.shards import png
from tests.unit.test_loader import FIRST, photos

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    yield
    datasets.enable_progress_bars()


def table(count: int, **columns: Any) -> Any:
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])}
    values: dict[str, Any] = {
        "image": [{"bytes": png(i), "path": None} for i in range(count)],
        "label": [i % 2 for i in range(count)],
    }
    for name, column in columns.items():
        values[name] = column
        features[name] = datasets.Value("string" if isinstance(column[0], str) else "int64")
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def write_parquet(folder: Path, rows: Any, shards: int = 1, split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(shards):
        rows.shard(shards, i, contiguous=True).to_parquet(folder / f"{split}-{i:05}-of-{shards:05}.parquet")
    return folder


def config(path: Path | str, **keys: Any) -> huggingface.Config:
    return huggingface.Config(name="huggingface", path=str(path), **keys)


def opened(path: Path | str, split: Any = "train", **keys: Any) -> HFDataset:
    source = config(path, **keys).open(split)
    assert isinstance(source, HFDataset)
    return source


def streamed(path: Path | str, **keys: Any) -> HFIterableDataset:
    stream = config(path, streaming=True, **keys).open_stream()
    assert stream is not None
    return stream


def grayscales(source: HFDataset) -> list[Any]:
    return [source.open_image(i).getpixel((0, 0)) for i in range(len(source))]


def test_images_are_held_out_where_the_dataset_has_one_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d", table(40))
    table(40).save_to_disk(tmp_path / "saved")
    for place in ("d", "saved"):
        parts = [opened(tmp_path / place, split) for split in ("train", "val", "test")]
        assert [len(part) for part in parts] == [29, 3, 8]
        assert sorted(itertools.chain.from_iterable(grayscales(part) for part in parts)) == list(range(40))
        for part in parts:
            assert part.channels == 1
            assert part.classes == ("even", "odd")
            assert part.labels is not None
            assert part.labels.tolist() == [grayscale % 2 for grayscale in grayscales(part)]
    assert opened(tmp_path / "d").fingerprint() == opened(tmp_path / "saved").fingerprint()
    assert opened(tmp_path / "d").fingerprint() != opened(tmp_path / "d", "test").fingerprint()
    assert opened(tmp_path / "d", channels=3).open_image(0).mode == "RGB"


def test_the_datasets_own_splits_are_taken(tmp_path: Path) -> None:
    splits = {"train": table(20), "validation": table(6), "test": table(4)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    for split, rows in splits.items():
        write_parquet(tmp_path / "d", rows, split=split)
    for place in ("d", "saved"):
        assert [len(opened(tmp_path / place, split)) for split in ("train", "val", "test")] == [20, 6, 4]
        assert len(opened(tmp_path / place, test_split="validation", val_split=None)) == 18
    with pytest.raises(ConfigError, match="has no split 'extra'; it has train, validation, test"):
        opened(tmp_path / "saved", train_split="extra")
    with pytest.raises(ConfigError, match='Unknown split "extra"'):
        opened(tmp_path / "d", train_split="extra")


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    rows = table(12, origin=["ink", "oil", "ink"] * 4, kind=[7, 11] * 6)
    rows.save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved", label="kind", domain="origin")
    assert source.classes == ("7", "11")
    assert source.domain_names == ("ink", "oil")
    assert source.domains is not None
    chosen = source.select(source.domains.argsort(descending=True)[:1])
    assert chosen.domains is not None
    assert chosen.domains.tolist() == [1]
    assert grayscales(chosen)[0] % 3 == 1
    assert opened(tmp_path / "saved", label=None).labels is None
    assert config(tmp_path / "saved", label=None).open("val") is None
    for key in ("label", "image", "domain"):
        with pytest.raises(
            ConfigError, match=rf"no column 'x'; it has 'image', 'label', 'origin', 'kind': mend `data\.{key}`"
        ):
            opened(tmp_path / "saved", **{key: "x"})
    with pytest.raises(ConfigError, match="holds no image but str"):
        opened(tmp_path / "saved", image="origin")
    rows.remove_columns("image").save_to_disk(tmp_path / "none")
    with pytest.raises(ConfigError, match="has 0 columns of images"):
        opened(tmp_path / "none")


def test_a_local_file_is_read(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "data", table(6))
    file = next(folder.iterdir()).rename(folder / "x.parquet")
    assert grayscales(opened(file)) == grayscales(opened(folder))
    (tmp_path / "x.feather").write_bytes(b"none")
    with pytest.raises(ConfigError, match=r"ends in none of \.parquet"):
        opened(tmp_path / "x.feather")


def test_one_grayscale_image_makes_no_dataset_grayscale_and_texts_that_say_none_are_no_class(tmp_path: Path) -> None:
    color = io.BytesIO()
    Image.new("RGB", (12, 10), "red").save(color, "png")
    rows = table(6, kind=["a", "None", "b ", "b", "nan", "a"])
    assert opened(write_parquet(tmp_path / "grayscale", rows)).channels == 1
    cells = [{"bytes": png(i) if i < 5 else color.getvalue(), "path": None} for i in range(6)]
    mixed = rows.remove_columns("image").add_column("image", cells, feature=datasets.Image())
    source = opened(write_parquet(tmp_path / "mixed", mixed), label="kind")
    assert source.channels == 3
    assert source.classes == ("a", "b")
    pool = config(tmp_path / "mixed", label="kind").open_pool()
    assert pool is not None
    assert pool.labels is not None
    assert streamed(tmp_path / "mixed", label=None).channels == 3


def test_labels_that_training_lacks_or_that_are_kept_back_are_told(tmp_path: Path) -> None:
    train, test = table(4, kind=["a", "b"] * 2), table(4, kind=["a", "b", "c", "b"])
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"no training row has: c \(1 in all\)"):
        opened(tmp_path / "saved", "test", label="kind")
    hidden = table(4).map(lambda row: {"label": -1})
    datasets.DatasetDict(train=table(20), test=hidden).save_to_disk(tmp_path / "hidden")
    with pytest.raises(ConfigError, match="keeps its labels to itself"):
        opened(tmp_path / "hidden", "test")


def test_files_beside_the_rows_are_read(tmp_path: Path) -> None:
    for i in range(20):
        path = tmp_path / "images" / ("a", "b")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    source = opened(tmp_path / "images")
    assert source.classes == ("a", "b")
    assert set(grayscales(source)) <= set(range(20))
    files = str(tmp_path / "images" / "**" / "*.png")
    by_kind = opened("imagefolder", data_files=files)
    assert by_kind.fingerprint() == source.fingerprint()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_replaced_by_its_neighbor_or_stops_the_run(tmp_path: Path, workers: int) -> None:
    images = [{"bytes": b"no image" if i in (3, 5, 8) else png(i), "path": None} for i in range(12)]
    rows = table(12)
    rows = rows.remove_columns("image").add_column("image", images, feature=datasets.Image())
    rows.save_to_disk(tmp_path / "saved")
    views = Views(ViewsConfig(size=8).for_channels(1)[0], (0.5,), (0.5,), 0)

    def run(bad_files: str) -> IndexedLoader:
        source = opened(tmp_path / "saved", label=None, max_bad_files=bad_files)
        made = IndexedLoader(source, views, 4, 0, DistInfo(0, 1, torch.device("cpu")), 3, workers)
        seen = torch.cat([batch.index for batch in made.from_step(0)]).tolist()
        assert sorted(seen) == [0, 1, 2, 4, 4, 6, 6, 7, 9, 9, 10, 11]
        return made

    assert run("3").unreadable == 3
    with pytest.raises(ConfigError, match=r"(?s)saved/train/row \d.*3 of 12 files can't be read"):
        run("2")
    with pytest.raises(DecodeError, match=r"row 7 can't be read as an image: its file '\S+gone.png' can't be opened"):
        encoded({"bytes": None, "path": str(tmp_path / "gone.png")}, "row 7")


def test_large_photos_are_decoded_small_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = photos(tmp_path / "photos", 4, 320, 240)
    images = [{"bytes": (tmp_path / "photos" / name).read_bytes(), "path": None} for name in names]
    table(4).remove_columns("image").add_column("image", images, feature=datasets.Image()).save_to_disk(tmp_path / "d")
    source = opened(tmp_path / "d", label=None)
    assert [size.tolist() for size in source.sizes(torch.arange(4))] == [[240] * 4, [320] * 4]
    read, whole = list[str](), hf_dataset.encoded

    def watched(cell: Any, name: str) -> bytes:
        read.append(name)
        return whole(cell, name)

    monkeypatch.setattr(hf_dataset, "encoded", watched)
    views = Views(ViewsConfig(size=8).for_channels(3)[0], (0.5,) * 3, (0.5,) * 3, 0)
    small = read_crops(source, views, FIRST, torch.arange(4)).views
    assert len(read) == 4
    source.sizes(torch.arange(4))
    assert source.open_reduced(0, 8).size == (40, 30)
    large = views.of_files([source.open_image(i) for i in range(4)], torch.arange(4), 0)
    assert all((one.float() - other.float()).abs().mean() < 2 for one, other in zip(small, large, strict=True))


def test_what_can_not_be_loaded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"can't be loaded .*contain any data files"):
        opened(tmp_path / "empty")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="can't be loaded"):
        opened(tmp_path / "bad")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"\.\[hf\]"):
        opened(tmp_path / "empty", "val")


def test_a_stream_reads_shards_from_any_place(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d", table(20), shards=3)
    stream = streamed(tmp_path / "d")
    assert stream.shards == ("0", "1", "2")
    assert stream.channels == 1
    assert stream.classes == ("even", "odd")
    assert [stream.size(i) for i in range(3)] == [7, 7, 6]
    samples = [list(stream.read(i)) for i in range(3)]
    assert [sample.data for part in samples for sample in part] == [png(i) for i in range(20)]
    assert [sample.label for part in samples for sample in part] == [i % 2 for i in range(20)]
    for start in range(8):
        assert list(stream.read(1, start)) == samples[1][start:]
    with pytest.raises(ConfigError, match="numbered images are needed"):
        config(tmp_path / "d", streaming=True).open("train")
    assert config(tmp_path / "d", streaming=True).open("val") is None
    write_parquet(tmp_path / "d", table(6), split="validation")
    val = config(tmp_path / "d", streaming=True, max_val_images=4).open("val")
    assert val is not None
    assert val.labels is not None
    assert val.labels.tolist() == [0, 1, 0, 1]


def test_a_stream_says_where_its_images_are_from(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d", table(6, origin=["ink", "oil", "ink"] * 2))
    stream = streamed(tmp_path / "d", domain="origin")
    assert stream.has_domains
    assert [sample.domain for sample in stream.read(0, 1)] == ["oil", "ink", "ink", "oil", "ink"]
    assert not streamed(tmp_path / "d").has_domains
    with pytest.raises(ConfigError, match=r"no column 'x'.*mend `data\.domain`"):
        streamed(tmp_path / "d", domain="x")


def test_a_shard_that_is_cut_off_is_told(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d", table(20), shards=2)
    stream = streamed(tmp_path / "d")
    path = tmp_path / "d" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    assert len(list(stream.read(0))) == 10
    with pytest.raises(ConfigError, match="can't be read on: "):
        list(stream.read(1))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_share_a_streams_shards_out_once(tmp_path: Path, workers: int) -> None:
    write_parquet(tmp_path / "d", table(24), shards=4)
    stream = streamed(tmp_path / "d", length=24)
    views = Views(ViewsConfig(size=8).for_channels(1)[0], (0.5,), (0.5,), 0)
    batches = StreamLoader(stream, views, 3, 0, DistInfo(0, 1, torch.device("cpu")), 8, workers)
    found = torch.cat([batch.index for batch in batches.from_step(0)]).tolist()
    assert Counter(found) == Counter(sample_id(str(shard), i) for shard in range(4) for i in range(6))
    assert torch.cat([batch.index for batch in batches.from_step(3)]).tolist() == found[9:]
