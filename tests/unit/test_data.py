"""Sources, their splits and their messages, on real files."""

from __future__ import annotations

import gzip
import hashlib
import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.compose import config_root
from ssl_pipeline.data import embedded as embedded_package
from ssl_pipeline.data.dataset import ArrayDataset, IndexedDataset
from ssl_pipeline.data.image_files import FileDataset, scan_folder
from ssl_pipeline.data.sources import folder as sources_folder
from ssl_pipeline.data.sources.embedded import Config as Embedded
from ssl_pipeline.data.sources.fashion_mnist import CLASSES, find_idx, read_idx
from ssl_pipeline.data.sources.fashion_mnist import Config as FashionMNIST
from ssl_pipeline.data.sources.folder import Config as Folder
from ssl_pipeline.data.splits import Split, draw_labels, stratified_split
from ssl_pipeline.data.targets import NumericTargets
from ssl_pipeline.downstream.classification import Config as Classification
from tests.embedded_subset import make, write_idx

GOLDEN_HELD_OUT = [1, 2, 12, 13, 22, 47, 53, 58]
GOLDEN_EMUS = ["emu/002.png", "emu/007.png", "emu/009.png", "emu/015.png"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
EMBEDDED = Path(str(embedded_package.__file__)).parent
LABELS = st.lists(st.integers(-1, 4), min_size=1, max_size=80).map(lambda values: torch.tensor(values))


def image(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value % 256, 0, 0)).save(path)
    return path


def class_folders(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        for i in range(count):
            image(root / name / f"{i:03}.png", i)
    return root


def folder(root: Path, **keys: Any) -> Folder:
    return Folder(name="folder", path=str(root), **keys)


def opened(config: Folder, split: Split) -> Any:
    source = config.open(split)
    assert source is not None
    return source


def message(config: Any, split: Split = "train") -> str:
    with pytest.raises(ConfigError) as caught:
        config.open(split)
    return str(caught.value)


# --- splits


@given(LABELS, st.integers(0, 90))
def test_hold_out_parts_the_samples_evenly(labels: Tensor, count: int) -> None:
    rest, held_out = stratified_split(labels, count, "a name")
    assert sorted([*rest.tolist(), *held_out.tolist()]) == list(range(len(labels)))
    assert rest.tolist() == sorted(rest.tolist())
    assert held_out.tolist() == sorted(held_out.tolist())
    labeled = int((labels >= 0).sum())
    assert len(held_out) == min(count, labeled)
    assert (labels[held_out] >= 0).all()
    for c in labels[labels >= 0].unique():
        share = int((labels == c).sum()) * len(held_out) / labeled
        assert abs(int((labels[held_out] == c).sum()) - share) <= 1


def test_hold_out_belongs_to_its_name() -> None:
    labels = torch.arange(100) % 4
    assert stratified_split(labels, 20, "a")[1].equal(stratified_split(labels, 20, "a")[1])
    assert not stratified_split(labels, 20, "a")[1].equal(stratified_split(labels, 20, "b")[1])
    assert stratified_split(labels, 20, "a")[1].tolist()[:8] == GOLDEN_HELD_OUT


def test_hold_out_leaves_tiny_classes_to_training() -> None:
    labels = torch.tensor([0] * 50 + [1] * 2 + [2])
    rest, _ = stratified_split(labels, 10, "a")
    assert set(labels[rest].tolist()) == {0, 1, 2}
    assert int((labels[rest] == 1).sum()) == 2


@given(LABELS, st.floats(0.01, 1), st.integers(0, 5))
def test_a_fraction_of_labels(labels: Tensor, fraction: float, seed: int) -> None:
    if not (labels >= 0).any():
        with pytest.raises(ConfigError, match="no training image has a label"):
            draw_labels(labels, None, fraction, seed)
        return
    drawn = draw_labels(labels, None, fraction, seed)
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert (labels[drawn] >= 0).all()
    for c in labels[labels >= 0].unique():
        of_class = int((labels == c).sum())
        assert int((labels[drawn] == c).sum()) == max(1, round(fraction * of_class))


def test_labels_per_class() -> None:
    labels = torch.arange(60) % 3
    labels[::7] = -1
    few, more = draw_labels(labels, 4, None, 0), draw_labels(labels, 9, None, 0)
    assert labels[few].bincount().tolist() == [4, 4, 4]
    assert set(few.tolist()) < set(more.tolist())
    assert not few.equal(draw_labels(labels, 4, None, 1))
    assert draw_labels(labels, None, None, 0).equal((labels >= 0).nonzero()[:, 0])


def test_too_few_labels_name_the_class() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1])
    with pytest.raises(ConfigError, match=r"`labels.per_class` is 3, and class 1 has only 2 .*at most 2"):
        draw_labels(labels, 3, None, 0)
    with pytest.raises(ConfigError, match="class 'dog' has only 2"):
        draw_labels(labels, 3, None, 0, classes=("cat", "dog"))


# --- idx files


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.booleans(), st.integers(0, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_idx_files_come_back(tmp_path: Path, shape: list[int], zipped: bool, seed: int) -> None:
    array = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    path = tmp_path / ("a-ubyte.gz" if zipped else "a-ubyte")
    write_idx(path, array)
    first = path.read_bytes()
    assert read_idx(path).equal(array)
    write_idx(path, array)
    assert path.read_bytes() == first


def test_broken_idx_files(tmp_path: Path) -> None:
    path = tmp_path / "train-labels-idx1-ubyte"
    write_idx(path, torch.arange(50, dtype=torch.uint8))
    whole = path.read_bytes()
    zipped = bytearray(gzip.compress(whole))
    zipped[12:20] = b"\xff" * 8
    cases = {
        "cut-ubyte": (whole[:-1], "declares 50 bytes and holds 49.*cut off"),
        "long-ubyte": (whole + b"0", "declares 50 bytes and holds 51"),
        "header-ubyte": (whole[:6], "ends within its header"),
        "magic-ubyte": (b"\x89PNG1234", "no IDX file.*begins with 89 50 4e"),
        "empty-ubyte": (b"", "no IDX file.*begins with nothing"),
        "cut-ubyte.gz": (gzip.compress(whole)[:-9], "can't be read"),
        "text-ubyte.gz": (b"text", "can't be read"),
        "rot-ubyte.gz": (bytes(zipped), "can't be read"),
    }
    for name, (data, fault) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=f"{name}.*{fault}"):
            read_idx(tmp_path / name)
    with pytest.raises(ConfigError, match=r"absent.*can't be read"):
        read_idx(tmp_path / "absent")


# --- the embedded set, and the whole one


def test_embedded_counts_are_even() -> None:
    for split, count in zip(SPLITS, (700, 100, 200), strict=True):
        source = Embedded(name="embedded").open(split)
        assert source.labels is not None
        assert source.labels.dtype == torch.int64
        assert source.labels.bincount().tolist() == [count] * 10
        assert source.pixels is not None
        assert (source.pixels.dtype, source.pixels.shape) == (torch.uint8, (10 * count, 1, 28, 28))
        assert (source.channels, source.license, source.classes) == (1, "MIT", CLASSES)


def test_embedded_files_are_those_that_were_measured() -> None:
    fingerprints = {split: Embedded(name="embedded").open(split).fingerprint() for split in SPLITS}
    assert fingerprints == {
        "train": "f2b0dc3d9c8249467e2c50375b241fb4",
        "val": "81c5f07deb2a3bc56a86b26a37f64f59",
        "test": "6932bdc4926d945d8ef44e1ce71c9c3c",
    }
    assert sum(path.stat().st_size for path in EMBEDDED.glob("*.gz")) < 5_000_000
    assert "Zalando" in (EMBEDDED / "LICENSE").read_text()


def test_every_split_has_the_statistics_of_train() -> None:
    train = Embedded(name="embedded").open("train")
    assert train.pixels is not None
    values = train.pixels.numpy() / 255
    assert train.mean == pytest.approx([values.mean()], rel=1e-9)
    assert train.std == pytest.approx([values.std(ddof=1)], rel=1e-9)
    for split in SPLITS:
        source = Embedded(name="embedded").open(split)
        assert (source.mean, source.std) == (train.mean, train.std)


def small_fashion_mnist(place: Path, ending: str = "", images: int = 40) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        labels = (torch.arange(images) % 10).to(torch.uint8)
        write_idx(place / f"{part}-images-idx3-ubyte{ending}", labels[:, None, None].expand(-1, 28, 28))
        write_idx(place / f"{part}-labels-idx1-ubyte{ending}", labels)
    return place


@pytest.mark.parametrize(("below", "ending"), [("", ""), ("", ".gz"), ("FashionMNIST/raw", ""), ("raw", ".gz")])
def test_a_folder_of_idx_files(tmp_path: Path, below: str, ending: str) -> None:
    small_fashion_mnist(tmp_path / below, ending)
    config = FashionMNIST(name="fashion_mnist", path=str(tmp_path), val=10)
    assert [len(config.open(split)) for split in SPLITS] == [30, 10, 40]
    train, val = config.open("train"), config.open("val")
    assert val.labels is not None
    assert val.labels.bincount().tolist() == [1] * 10
    assert train.describe(3) == "image 3 of fashion_mnist"
    assert np.asarray(val.open_image(4))[0, 0] == val.labels[4]


def test_wrong_folders_of_idx_files(tmp_path: Path) -> None:
    def told(path: Path, val: int = 10) -> str:
        return message(FashionMNIST(name="fashion_mnist", path=str(path), val=val))

    assert f"`data.path`: {str(tmp_path / 'absent')!r} does not exist" in told(tmp_path / "absent")
    assert "is a file" in told(image(tmp_path / "a.png"))
    assert "holds no train-images-idx3-ubyte" in told(tmp_path)
    assert "`data.val` is 40" in told(small_fashion_mnist(tmp_path / "small"), 40)
    mixed = small_fashion_mnist(tmp_path / "mixed")
    write_idx(mixed / "train-labels-idx1-ubyte", torch.zeros(39, dtype=torch.uint8))
    assert "they must be N images and N labels" in told(mixed)
    write_idx(mixed / "train-labels-idx1-ubyte", torch.full((40,), 10, dtype=torch.uint8))
    assert "labels from 0 to 9" in told(mixed)


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("Error downloading"), ConnectionResetError()])
def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fail)
    text = message(FashionMNIST(name="fashion_mnist", download_to=str(tmp_path)))
    assert "can't be downloaded" in text
    assert "`data.path=FOLDER`" in text


def test_the_subset_is_made_the_same_every_time(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    whole = Path("/usr/share/datasets/fashion-mnist")
    if not whole.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    images, labels = (read_idx(find_idx(whole, f"t10k-{kind}-ubyte")) for kind in ("images-idx3", "labels-idx1"))
    for part in ("train", "t10k"):  # the test images in both parts: the whole set would take half a minute
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", labels)
    make(tmp_path, folders[0])
    name = "t10k-images-idx3-ubyte.gz"
    digests = [
        hashlib.sha256(gzip.decompress((place / name).read_bytes())).digest() for place in (folders[0], EMBEDDED)
    ]
    assert digests[0] == digests[1]


# --- sources in memory


def test_an_array_source() -> None:
    pixels = torch.arange(5 * 3 * 2 * 4, dtype=torch.uint8).reshape(5, 3, 2, 4)
    source = ArrayDataset("some", pixels, torch.tensor([0, 1, 0, 1, 1]), ("a", "b"), "MIT")
    assert (len(source), source.channels, source.describe(2)) == (5, 3, "image 2 of some")
    opened_image = source.open_image(1)
    assert (opened_image.mode, opened_image.size) == ("RGB", (4, 2))
    np.testing.assert_array_equal(np.asarray(opened_image), pixels[1].permute(1, 2, 0))
    assert ArrayDataset("grayscale", pixels[:, :1]).open_image(0).mode == "L"
    part = source.select(torch.tensor([3, 0]))
    assert part.labels is not None
    assert part.labels.tolist() == [1, 0]
    assert np.asarray(part.open_image(0)).tolist() == np.asarray(source.open_image(3)).tolist()
    mean, std = source.statistics()
    np.testing.assert_allclose(mean, (pixels.double() / 255).mean((0, 2, 3)))
    np.testing.assert_allclose(std, (pixels.double() / 255).std((0, 2, 3)))


def test_a_fingerprint_is_of_pixels_and_labels() -> None:
    pixels, labels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    first = ArrayDataset("a", pixels, labels).fingerprint()
    assert ArrayDataset("another name", pixels.clone(), labels.clone()).fingerprint() == first
    assert ArrayDataset("a", pixels, labels.flip(0)).fingerprint() != first
    assert ArrayDataset("a", pixels).fingerprint() != first
    changed = pixels.clone()
    changed[3, 0, 1, 1] = 1
    assert ArrayDataset("a", changed, labels).fingerprint() != first


# --- folders


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "sub/deeper/c.webp", ".hidden.png", ".git/d.png"):
        image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    source = opened(folder(tmp_path), "train")
    assert source.files == ["a.png", "b.JPG", "sub/deeper/c.webp"]
    assert source.labels is None
    assert source.classes is None
    assert folder(tmp_path).open("val") is None
    assert folder(tmp_path).open("test") is None
    assert source.describe(2) == str(tmp_path / "sub/deeper/c.webp")


def test_class_folders_are_split_evenly_and_always_alike(tmp_path: Path) -> None:
    class_folders(tmp_path, cat=50, dog=30, emu=20)
    parts: dict[Split, Any] = {split: opened(folder(tmp_path), split) for split in SPLITS}
    files = [file for part in parts.values() for file in part.files]
    assert len(files) == len(set(files)) == 100
    assert [part.labels.bincount().tolist() for part in parts.values()] == [[36, 22, 14], [4, 2, 2], [10, 6, 4]]
    assert all(part.classes == ("cat", "dog", "emu") for part in parts.values())
    for part in parts.values():
        assert [part.classes[label] for label in part.labels] == [file.split("/")[0] for file in part.files]
    assert [file for file in parts["test"].files if "emu" in file] == GOLDEN_EMUS


def test_named_folders_are_the_splits(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", cat=20, dog=20)
    class_folders(tmp_path / "val", dog=3)
    only_val = {split: opened(folder(tmp_path), split) for split in SPLITS}
    assert [len(only_val[split]) for split in SPLITS] == [36, 4, 3]
    assert only_val["test"].labels.tolist() == [1, 1, 1]

    class_folders(tmp_path / "test", cat=2, dog=2)
    both = {split: opened(folder(tmp_path), split) for split in SPLITS}
    assert [len(both[split]) for split in SPLITS] == [40, 3, 4]
    assert both["val"].root.name == "val"

    elsewhere = class_folders(tmp_path.with_name(f"{tmp_path.name}-more"), cat=5)
    assert len(opened(folder(tmp_path, test_path=str(elsewhere)), "test")) == 5


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    class_folders(tmp_path / "real", cat=5)
    root = class_folders(tmp_path / "root", dog=5)
    (root / "cat").symlink_to(tmp_path / "real" / "cat")
    (root / "dog" / "up").symlink_to(root)
    (root / "itself").symlink_to("itself")
    assert opened(folder(root), "train").classes == ("cat", "dog")


def test_links_that_lead_nowhere_are_unreadable_files(tmp_path: Path) -> None:
    class_folders(tmp_path, cat=5, dog=5)
    (tmp_path / "dog" / "loop.png").symlink_to("loop.png")
    (tmp_path / "dog" / "gone.png").symlink_to("nowhere.png")
    text = message(folder(tmp_path))
    assert "gone.png: it is not there (a broken link?)" in text
    assert "loop.png: " in text
    assert "2 of 12 files" in text


def test_unreadable_files_stop_the_run_with_a_list(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class_folders(tmp_path, cat=4, dog=4)
    for i in range(12):
        (tmp_path / "cat" / f"bad{i:02}.jpg").write_text("text")
    (tmp_path / "dog" / "bad.png").write_bytes(b"")
    text = message(folder(tmp_path))
    assert f"{tmp_path / 'cat' / 'bad00.jpg'}: it is no image of a known format" in text
    assert "… and 3 more" in text
    assert "bad11" not in text
    assert "13 of 21 files can't be read as images" in text
    assert "data.max_bad_files=1%" in text
    source = opened(folder(tmp_path, max_bad_files="90%"), "train")
    assert source.bad_files is not None
    left_out = list(source.bad_files.faults)
    assert len(left_out) == 13
    assert left_out[-1] == str(tmp_path / "dog" / "bad.png")
    assert not set(left_out) & {source.describe(i) for i in range(len(source))}
    assert "left out 13 files of 21" in caplog.text


def test_folders_that_are_none(tmp_path: Path) -> None:
    assert "does not exist" in message(folder(tmp_path / "absent"))
    assert "is a file, and a folder is needed" in message(folder(image(tmp_path / "a.png")))
    assert "only one image (a.png), and at least two are needed" in message(folder(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("text")
    text = message(folder(tmp_path / "empty"))
    assert "`data.path`" in text
    assert "holds no image" in text
    assert ".jpeg" in text


def test_one_class_is_no_class(tmp_path: Path) -> None:
    class_folders(tmp_path, only=6)
    assert opened(folder(tmp_path), "train").labels is None
    assert len(opened(folder(tmp_path), "train")) == 6
    assert folder(tmp_path).open("val") is None
    assert folder(tmp_path).open("test") is None
    told = Classification(name="classification").check(opened(folder(tmp_path), "train"))
    assert "one folder per class" in told[0]
    assert str(tmp_path) in told[0]


def test_test_folders_that_do_not_fit(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data", cat=5, dog=5)

    def told(place: Path) -> str:
        return message(folder(root, test_path=str(place)), "test")

    text = told(class_folders(tmp_path / "more", cat=2, yak=2))
    assert "classes that training has not: yak" in text
    assert "cat, dog" in text
    assert "has no class folders" in told(image(image(tmp_path / "flat" / "a.png").with_name("b.png")).parent)
    assert "`data.test_path`" in told(tmp_path / "absent")
    assert "would be trained on" in told(root / "cat")
    assert "would be trained on" in told(root)


def test_a_folder_source_travels_and_is_recognized(tmp_path: Path) -> None:
    first = opened(folder(class_folders(tmp_path / "a", cat=5, dog=5)), "train")
    copy = opened(folder(class_folders(tmp_path / "b", cat=5, dog=5)), "train")
    assert first.fingerprint() == copy.fingerprint()
    again: IndexedDataset = pickle.loads(pickle.dumps(first))
    assert again.fingerprint() == first.fingerprint()
    assert again.open_image(1).tobytes() == first.open_image(1).tobytes()
    assert first.select(torch.tensor([1, 0])).fingerprint() != first.fingerprint()
    path = Path(copy.describe(0))
    path.write_bytes(path.read_bytes() + b"more")
    for looked in (scan_folder, sources_folder._scan):
        looked.cache_clear()  # a new process
    assert first.fingerprint() != opened(folder(tmp_path / "b"), "train").fingerprint()
    path.unlink()
    with pytest.raises(ConfigError, match=f"{path.name} has gone"):
        FileDataset("without a manifest", path.parent, [path.name], 3).fingerprint()


def test_grayscale(tmp_path: Path) -> None:
    source = opened(folder(class_folders(tmp_path, cat=5, dog=5), channels=1), "train")
    assert source.open_image(0).mode == "L"
    assert source.channels == 1


@pytest.mark.parametrize(
    ("name", "config"), [("embedded", Embedded), ("fashion_mnist", FashionMNIST), ("folder", Folder)]
)
def test_yaml_says_every_key_and_its_default(name: str, config: Any) -> None:
    tree: Any = OmegaConf.to_container(OmegaConf.load(config_root() / "data" / f"{name}.yaml"))
    required = {"path": "x"} if name == "folder" else {}
    assert set(tree) | set(required) == set(config.model_fields)
    assert config(**tree, **required) == config(name=name, **required)


# --- what is known beside the images


def test_other_annotations_are_other_data() -> None:
    images = ArrayDataset("x", torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    values = torch.arange(4.0)[:, None]
    one, same, other = (
        images.with_annotations(NumericTargets(v, ("age",))) for v in (values, values.clone(), values + 1)
    )
    assert one.fingerprint() == same.fingerprint()
    assert len({images.fingerprint(), one.fingerprint(), other.fingerprint()}) == 3
    assert one.select(torch.tensor([1])).fingerprint() != other.select(torch.tensor([1])).fingerprint()


def test_the_license_that_a_user_names_is_that_of_every_part(tmp_path: Path) -> None:
    for number in range(20):
        place = tmp_path / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(place)
    config = Folder(name="folder", path=str(tmp_path), license="CC0-1.0")
    parts = [config.open_pool(), *(config.open(split) for split in SPLITS), *config.open_every().values()]
    assert {part.license for part in parts if part is not None} == {"CC0-1.0"}
    unnamed = config.model_copy(update={"license": None}).open_pool()
    assert unnamed is not None
    assert unnamed.license is None
