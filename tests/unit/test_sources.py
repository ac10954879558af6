"""Sources on real files: the embedded images, idx files, and folders with whatever people keep in them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.decode import DecodeError, decode
from ssl_pipeline.data.image_files import FileDataset, scan_folder
from ssl_pipeline.data.sources import embedded, fashion_mnist, folder
from ssl_pipeline.data.sources.fashion_mnist import read_idx
from ssl_pipeline.data.splits import draw_labels, stratified_split
from tests.embedded_subset import write_idx


def picture(path: Path, size: tuple[int, int] = (12, 9), color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def test_the_embedded_images_are_those_that_were_drawn() -> None:
    opened = {split: embedded.Config(name="embedded").open(split) for split in ("train", "val", "test")}
    assert {split: len(source) for split, source in opened.items()} == {"train": 7000, "val": 1000, "test": 2000}
    for source in opened.values():
        assert source.labels is not None
        assert source.labels.bincount().unique().numel() == 1
        assert source.pixels is not None
        assert source.pixels.shape[1:] == (1, 28, 28)
    prints = [source.fingerprint() for source in opened.values()]
    assert prints == [
        "f2b0dc3d9c8249467e2c50375b241fb4",
        "81c5f07deb2a3bc56a86b26a37f64f59",
        "6932bdc4926d945d8ef44e1ce71c9c3c",
    ]
    assert opened["train"].mean == pytest.approx((0.2852,), abs=1e-3)


def test_no_image_stands_in_two_splits() -> None:
    digests = []
    for split in ("train", "val", "test"):
        source = embedded.Config(name="embedded").open(split)
        assert source.pixels is not None
        digests.append({image.numpy().tobytes() for image in source.pixels})
    assert not digests[0] & digests[1]
    assert not digests[0] & digests[2]


def test_fashion_mnist_reads_a_folder_and_says_what_is_missing(tmp_path: Path) -> None:
    for part, count in (("train", 40), ("t10k", 20)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", (torch.arange(count) % 10).to(torch.uint8))
    config = fashion_mnist.Config(name="fashion_mnist", path=str(tmp_path), val=10)
    assert [len(config.open(s)) for s in ("train", "val", "test")] == [30, 10, 20]
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="four idx files"):
        fashion_mnist.Config(name="fashion_mnist", path=str(tmp_path / "other")).open("train")
    with pytest.raises(ConfigError, match="does not exist"):
        fashion_mnist.Config(name="fashion_mnist", path=str(tmp_path / "nowhere")).open("train")


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.booleans())
def test_idx_round_trip(shape: list[int], zipped: bool) -> None:
    import tempfile

    array = torch.randint(0, 256, shape, dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / ("x.gz" if zipped else "x")
        write_idx(path, array)
        assert torch.equal(read_idx(path), array)


def test_a_damaged_idx_file_is_told(tmp_path: Path) -> None:
    write_idx(tmp_path / "x", torch.zeros(4, 4, dtype=torch.uint8))
    whole = (tmp_path / "x").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-3])
    (tmp_path / "text").write_bytes(b"hello world")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(whole)[:-9])
    for name, word in (("cut", "declares 16 bytes"), ("text", "no IDX file"), ("cut.gz", "can't be read")):
        with pytest.raises(ConfigError, match=word):
            read_idx(tmp_path / name)


@given(st.lists(st.integers(0, 3), min_size=8, max_size=60), st.integers(1, 7), st.integers(0, 9))
def test_what_is_held_out_is_even_and_apart(labels: list[int], count: int, seed: int) -> None:
    array = torch.tensor(labels)
    rest, held_out = stratified_split(array, count, seed)
    assert sorted([*rest.tolist(), *held_out.tolist()]) == list(range(len(labels)))
    assert len(held_out) == count
    sizes, taken = array.bincount(minlength=4), array[held_out].bincount(minlength=4)
    wanted = sizes * count / len(labels)
    assert bool(((taken - wanted).abs() < 2).all())


def test_label_draws() -> None:
    labels = torch.arange(100) % 10
    labels[0] = -1
    few, more = (draw_labels(labels, n, None, seed=3) for n in (2, 5))
    assert set(few.tolist()) <= set(more.tolist())
    assert labels[more].bincount().tolist() == [5] * 10
    assert 0 not in draw_labels(labels, None, None, 0).tolist()
    assert labels[draw_labels(labels, None, 0.01, 0)].bincount().tolist() == [1] * 10
    assert draw_labels(labels, 2, None, 4).tolist() != few.tolist()
    with pytest.raises(ConfigError, match="class 0 has only 9"):
        draw_labels(labels, 10, None, 0)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / f"{i}.png")
    picture(tmp_path / "deeper" / "ünïcode 世界.JPG")
    (tmp_path / "notes.txt").write_text("no image")
    picture(tmp_path / ".hidden.png")
    config = folder.Config(name="folder", path=str(tmp_path))
    source = config.open("train")
    assert isinstance(source, FileDataset)
    assert source.files == ["0.png", "1.png", "2.png", "3.png", "deeper/ünïcode 世界.JPG"]
    assert source.labels is None
    assert config.open("val") is config.open("test") is None


def test_class_folders_are_split_the_same_way_every_time(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for i in range(20):
            picture(tmp_path / name / f"{i}.png", color="blue")
    config = folder.Config(name="folder", path=str(tmp_path))
    parts = [config.open(split) for split in ("train", "val", "test")]
    files = [set(part.files) for part in parts if isinstance(part, FileDataset)]
    assert [len(part) for part in files] == [29, 3, 8]
    assert len(set.union(*files)) == 40
    assert isinstance(parts[0], FileDataset)
    assert parts[0].classes == ("cat", "dog")
    assert parts[0].labels is not None
    assert all((f.split("/")[0] == "dog") == bool(y) for f, y in zip(parts[0].files, parts[0].labels, strict=True))


def test_train_and_test_folders_are_the_splits(tmp_path: Path) -> None:
    for part, count in (("train", 10), ("test", 4)):
        for name in ("cat", "dog"):
            for i in range(count):
                picture(tmp_path / part / name / f"{i}.png", color="green")
    config = folder.Config(name="folder", path=str(tmp_path))
    assert [len(config.open(s) or []) for s in ("train", "val", "test")] == [18, 2, 8]
    picture(tmp_path / "test" / "fox" / "0.png")
    folder._scan.cache_clear()
    scan_folder.cache_clear()
    with pytest.raises(ConfigError, match="fox"):
        config.open("test")


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / "a" / f"{i}.png", color="white")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    source = folder.Config(name="folder", path=str(tmp_path)).open("train")
    assert isinstance(source, FileDataset)
    assert sorted(source.files)[0] == "a/0.png"
    assert (
        len(source) + sum(len(folder.Config(name="folder", path=str(tmp_path)).open(s) or []) for s in ("val", "test"))
        == 3
    )


def test_files_that_are_no_images_stop_with_a_list_or_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(4):
        picture(tmp_path / f"{i}.png", color="black")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ConfigError) as told:
        folder.Config(name="folder", path=str(tmp_path)).open("train")
    for text in (
        "text.jpg: it is no image",
        "empty.png: it is empty",
        "gone.png: it is not there",
        "3 of 7",
        "max_bad_files",
    ):
        assert text in str(told.value)
    source = folder.Config(name="folder", path=str(tmp_path), max_bad_files="90%").open("train")
    assert source is not None
    assert len(source) == 4
    assert "left out 3 files" in caplog.text


def test_everything_decodes_to_8_bits_as_meant(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "float.tif")
    for name in ("16.png", "float.tif"):
        values = np.asarray(decode(tmp_path / name, 1))
        assert values.min() == 0
        assert values.max() == 255
        assert len(np.unique(values)) > 50  # neither clipped nor folded
    Image.new("CMYK", (4, 4), (255, 0, 0, 0)).save(tmp_path / "cmyk.jpg")
    assert decode(tmp_path / "cmyk.jpg", 3).mode == "RGB"
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert decode(tmp_path / "clear.png", 3).getpixel((0, 0)) == (255, 255, 255)
    frames = [Image.new("P", (4, 4), c) for c in (0, 1)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert decode(tmp_path / "moving.gif", 3).size == (4, 4)
    turned = Image.new("RGB", (6, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg", 3).size == (3, 6)
    assert decode(tmp_path / "turned.jpg", 1).mode == "L"


def test_damaged_files_are_named(tmp_path: Path) -> None:
    noise = (torch.rand(64, 64, 3) * 255).to(torch.uint8).numpy()
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    with pytest.raises(DecodeError, match=r"cut\.jpg.*truncated"):
        decode(tmp_path / "cut.jpg", 3)


@pytest.mark.parametrize(
    ("what", "word"), [("missing", "does not exist"), ("file", "is a file"), ("empty", "no image"), ("one", "only one")]
)
def test_wrong_folders_are_told(tmp_path: Path, what: str, word: str) -> None:
    path = tmp_path / what
    if what == "file":
        path.write_text("")
    if what in ("empty", "one"):
        path.mkdir()
    if what == "one":
        picture(path / "a.png")
    with pytest.raises(ConfigError, match=word):
        folder.Config(name="folder", path=str(path)).open("train")
