"""Images of more than 8 bits: one scale for a data set, kept with the encoder, and no bit lost on the way to a batch."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.data.bad_files import warn_once
from ssl_pipeline.data.dataset import ArrayDataset, IndexedDataset
from ssl_pipeline.data.decode import as_8_bit, check_header, decode
from ssl_pipeline.data.image_files import FileDataset
from ssl_pipeline.data.loader import read_crops
from ssl_pipeline.data.prepare import prepare
from ssl_pipeline.data.reading import read_in_order
from ssl_pipeline.data.source import SourceConfig, StreamConfig, at_range_of
from ssl_pipeline.data.sources import coco, folder, huggingface, mask_folder, table, webdataset
from ssl_pipeline.data.sources import torchvision as torchvision_sets
from ssl_pipeline.data.stream_loader import read_stream_crops
from ssl_pipeline.downstream.load_model import Model
from ssl_pipeline.export.embed import EmbedConfig, open_sources
from ssl_pipeline.export.predict import open_predictor, predict
from ssl_pipeline.finetune import finetune
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.models.encoder import load_encoder
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.pretrain_config import PretrainConfig
from ssl_pipeline.schedules import TrainProgress
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing
from tests.shards import write_tar

CPU, FIRST = torch.device("cpu"), TrainProgress(0, 1, 1)
DRAWS = np.random.default_rng(0)  # no test depends on which values are drawn


def images(root: Path, make: Callable[[int], np.ndarray], ending: str = "tif", count: int = 6) -> Path:
    for kind in ("a", "b"):
        (root / kind).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(make(i)).save(root / kind / f"{i}.{ending}")
    return root


def opened(root: Path, **keys: Any) -> FileDataset:
    source = folder.Config(name="folder", path=str(root), **keys).open_pool()
    assert isinstance(source, FileDataset)
    return source


def twelve_bits(i: int) -> np.ndarray:
    values = DRAWS.integers(0, 2048, (8, 8)).astype(np.uint16)
    values[0, 0] = 4000 if i == 5 else 2000
    return values


def integers(i: int) -> np.ndarray:
    return np.full((8, 8), 200 + i % 2 * 60, np.int32)


def floats(i: int) -> np.ndarray:
    values = DRAWS.random((8, 8)).astype(np.float32) * 0.9
    values[0, 0] = 1.001 if i == 3 else 0
    return values


def tissue(i: int) -> np.ndarray:
    values = DRAWS.normal(40, 20, (8, 8)).astype(np.int32)
    values[0] = (-1024, *([3071 if i % 2 else 1000] * 7))
    return values


@pytest.mark.parametrize(
    ("make", "ending", "expected"),
    [
        (twelve_bits, "png", (0, 4095)),
        (integers, "tif", (0, 511)),
        (floats, "tif", (0, 1.001)),
        (tissue, "tif", (-1024, 3071)),
    ],
)
def test_one_scale_holds_for_all_files(
    tmp_path: Path, make: Callable[[int], np.ndarray], ending: str, expected: tuple[float, float]
) -> None:
    root = images(tmp_path / "data", make, ending)
    config = folder.Config(name="folder", path=str(root))
    for split, source in config.open_every().items():
        assert source.value_range == pytest.approx(expected, rel=1e-6), split
        low, high = source.value_range or (0, 1)
        for i in range(len(source)):
            stored = np.asarray(Image.open(source.describe(i))).astype(np.float64)
            shown = np.asarray(source.open_image(i))
            assert shown.dtype == np.float32
            np.testing.assert_allclose(shown, (stored - low) / (high - low), atol=1e-6)


def test_no_bit_of_16_is_lost_between_file_and_batch(tmp_path: Path) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    root = images(tmp_path / "ramp", lambda i: ramp, "png", 2)
    expected = torch.from_numpy(ramp.astype(np.float64) / 65535).float()
    for channels in (1, 3):
        source = opened(root, channels=channels, test=0.25, val=0.25)
        (read,) = read_in_order(
            source, Preprocessing(256, (0.0,) * channels, (1.0,) * channels), CPU, torch.tensor([0])
        )
        assert read.shape == (1, channels, 256, 256)
        assert all(torch.equal(plane, expected) for plane in read[0])
        whole = ViewsConfig(size=256, num_views=1, crop={"scale": (1, 1), "ratio": (1, 1)}, horizontal_flip=0.0)
        views = Views(whole.for_channels(channels)[0], (0.0,) * channels, (1.0,) * channels, 0)
        (crops,) = read_crops(source, views, FIRST, torch.tensor([0])).views
        assert all(torch.equal(plane, expected) for plane in crops[0])
        assert len(crops.unique()) == 65536


def test_images_of_8_bits_are_bytes_and_may_stand_beside_others(tmp_path: Path) -> None:
    root = images(
        tmp_path / "data", lambda i: np.full((8, 8, 3), 100 + i, np.uint8) if i % 2 else twelve_bits(i), "png"
    )
    source = opened(root)
    assert source.value_range == (0, 2047)
    whole = ViewsConfig(size=8, num_views=1, crop={"scale": (1, 1), "ratio": (1, 1)}, horizontal_flip=0.0)
    views = Views(whole.for_channels(3)[0], (0.0,) * 3, (1.0,) * 3, 0)
    bright = [i for i in range(len(source)) if int(Path(source.describe(i)).stem) % 2]
    (crops,) = read_crops(source, views, FIRST, torch.arange(len(source))).views
    assert crops.dtype == torch.float32
    for i in bright:
        assert crops[i].mean() == pytest.approx((100 + int(Path(source.describe(i)).stem)) / 255)
    (alone,) = read_crops(source, views, FIRST, torch.tensor(bright)).views
    assert alone.dtype == torch.uint8  # as ever
    assert as_8_bit(source.open_image(next(i for i in range(len(source)) if i not in bright)), "RGB").mode == "RGB"


def in_files(root: Path, stored: list[np.ndarray], ending: str) -> list[Path]:
    root.mkdir(parents=True)
    files = [root / f"{i}.{ending}" for i in range(len(stored))]
    for file, values in zip(files, stored, strict=True):
        Image.fromarray(values).save(file)
    return files


def in_archives(root: Path, files: list[Path], **keys: Any) -> SourceConfig:
    for name in ("train", "val"):
        members = [(f"{i}{file.suffix}", file.read_bytes()) for i, file in enumerate(files)]
        classes = [(f"{i}.cls", str(i % 2).encode()) for i in range(len(files))]
        write_tar(root / f"{name}.tar", [member for pair in zip(members, classes, strict=True) for member in pair])
    given = {"path": str(root / "train.tar"), "val": str(root / "val.tar"), "classes": ("a", "b")}
    return webdataset.Config(name="webdataset", **given, **keys)


def in_rows(root: Path, files: list[Path], **keys: Any) -> SourceConfig:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    rows = datasets.Dataset.from_dict({"image": cells, "label": [i % 2 for i in range(len(files))]}, features=features)
    (root / "rows").mkdir()
    names = ("train", "validation") if keys.get("streaming") else ("train",)
    for name in names:
        rows.to_parquet(root / "rows" / f"{name}-00000-of-00001.parquet")
    return huggingface.Config(name="huggingface", path=str(root / "rows"), **keys)


def in_streamed_rows(root: Path, files: list[Path], **keys: Any) -> SourceConfig:
    return in_rows(root, files, streaming=True, **keys)


def with_boxes(root: Path, files: list[Path], **keys: Any) -> SourceConfig:
    record = {
        "images": [{"id": i, "file_name": str(file)} for i, file in enumerate(files)],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 4, 4]} for i in range(len(files))],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (root / "boxes.json").write_text(json.dumps(record))
    return coco.Config(name="coco", path=str(root / "boxes.json"), **keys)


def with_masks(root: Path, files: list[Path], **keys: Any) -> SourceConfig:
    (root / "scenes" / "masks").mkdir(parents=True)
    (root / "scenes" / "images").symlink_to(files[0].parent)
    for file in files:
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(root / "scenes" / "masks" / f"{file.stem}.png")
    return mask_folder.Config(name="mask_folder", path=str(root / "scenes"), **keys)


def of_torchvision(root: Path, files: list[Path], **keys: Any) -> SourceConfig:
    for i, file in enumerate(files):
        (root / "classes" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (root / "classes" / "ab"[i % 2] / file.name).symlink_to(file)
    return torchvision_sets.Config(
        name="torchvision", dataset="ImageFolder", path=str(root / "classes"), **{"channels": 1, **keys}
    )


KINDS = [in_archives, in_rows, in_streamed_rows, with_boxes, with_masks, of_torchvision]


def all_parts(config: SourceConfig) -> Iterable[list[IndexedDataset]]:
    """Sources that hold all images together; of a stream its first images, and again those of `val`."""
    if isinstance(config, StreamConfig) and (stream := config.stream()) is not None:
        val = config.open("val")
        assert val is not None
        return [[stream.preview(100)], [val]]
    return [list(config.open_every().values())]


SETS: list[tuple[list[np.ndarray], str, tuple[float, float]]] = [
    ([np.arange(i, 64 + i, dtype=np.uint16).reshape(8, 8) * 31 + 200 for i in range(12)], "png", (0, 4095)),
    ([np.full((8, 8), 200 + i % 2 * 60, np.int32) for i in range(12)], "tif", (0, 511)),
    ([np.full((8, 8), [0.5, 1.001, 0.25][i % 3], np.float32) for i in range(12)], "tif", (0, 1.001)),
]


@pytest.mark.parametrize(("stored", "ending", "expected"), SETS, ids=["12 bits", "integers", "floats"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_scale_holds_for_all_images_of_every_source(
    tmp_path: Path,
    kind: Callable[..., SourceConfig],
    stored: list[np.ndarray],
    ending: str,
    expected: tuple[float, float],
) -> None:
    config = kind(tmp_path, in_files(tmp_path / "files", stored, ending))
    low, high = expected
    wanted = sorted(((values.astype(np.float64) - low) / (high - low) for values in stored), key=np.sum)
    for sources in all_parts(config):
        assert all(source.value_range == pytest.approx(expected, rel=1e-6) for source in sources)
        shown = [np.asarray(source.open_image(i)) for source in sources for i in range(len(source))]
        assert {image.dtype.name for image in shown} == {"float32"}
        np.testing.assert_allclose(sorted(shown, key=np.sum), wanted, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_takes_the_range_that_is_given(tmp_path: Path, kind: Callable[..., SourceConfig]) -> None:
    files = in_files(tmp_path / "files", SETS[0][0], "png")
    for i, (key, expected) in enumerate([("dtype", (0, 65535)), ((100, 900), (100, 900)), ("percentiles", None)]):
        (tmp_path / str(i)).mkdir()
        config = kind(tmp_path / str(i), files, range=key)
        for sources in all_parts(config):
            found = {source.value_range for source in sources}
            assert len(found) == 1
            (low, high) = found.pop() or (0, 0)
            assert (low, high) == expected if expected else (200 < low < 600 and 1900 < high < 2600)


def test_a_stream_is_not_read_for_a_range_that_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = in_files(tmp_path / "files", SETS[0][0], "png")
    config = in_archives(tmp_path, files, range=(0, 4000), channels=1)
    assert isinstance(config, StreamConfig)
    monkeypatch.setattr(webdataset.TarStream, "read", None)
    stream = config.stream()
    assert stream is not None
    assert stream.value_range == (0, 4000)


def test_the_views_of_a_stream_are_at_its_range(tmp_path: Path) -> None:
    stored = SETS[0][0]
    config = in_archives(tmp_path, in_files(tmp_path / "files", stored, "png"))
    assert isinstance(config, StreamConfig)
    stream = config.stream()
    assert stream is not None
    whole = ViewsConfig(size=8, num_views=1, crop={"scale": (1, 1), "ratio": (1, 1)}, horizontal_flip=0.0)
    views = Views(whole.for_channels(1)[0], (0.0,), (1.0,), 0)
    (crops,) = read_stream_crops(stream, views, FIRST, list(enumerate(stream.read(0))), with_labels=False).views
    np.testing.assert_allclose(crops[:, 0], np.stack(stored) / 4095, atol=1e-6)


def test_images_that_a_library_decodes_are_at_the_range_too() -> None:
    images = [(Image.fromarray(values), 0) for values in SETS[0][0]]
    source = torchvision_sets.TorchvisionDataset("pictures", images, 1, None, None)
    source.value_range = (0, 4095)
    for i, chosen in enumerate((2, 0)):
        shown = np.asarray(source.select(torch.tensor([2, 0])).open_image(i))
        np.testing.assert_allclose(shown, SETS[0][0][chosen] / 4095, atol=1e-6)


def test_what_an_encoder_was_pretrained_at_holds_for_every_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_archives(tmp_path, in_files(tmp_path / "files", SETS[0][0], "png"))
    words = ["tracking=off", "num_workers=0", "data=webdataset", f"data.path={tmp_path / 'train.tar'}", "steps=2"]
    tiny = ["transform=small", "transform.size=8", "backbone.width=4", "batch_size=4", "evaluate_every=0 steps"]
    run = pretrain(load("pretrain", PretrainConfig, [*words, *tiny, f"output={tmp_path / 'run'}"]))
    assert "0 is black and 4095 white (`data.range`), by the first 64 images of the stream" in " ".join(
        capsys.readouterr().out.split()
    )
    assert load_encoder(run)[1].blueprint.range == (0, 4095)
    dark = in_files(tmp_path / "dark", [values // 16 for values in SETS[0][0]], "png")
    for i, kind in enumerate(KINDS):
        (tmp_path / str(i)).mkdir()
        config = at_range_of(kind(tmp_path / str(i), dark), str(run))
        assert {source.value_range for sources in all_parts(config) for source in sources} == {(0, 4095)}


def test_an_image_that_no_range_is_known_for_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    (file,) = in_files(tmp_path / "files", SETS[1][0][:1], "tif")
    assert decode(file, 1).mode == "L"
    assert "scaled one by one" in caplog.text


@pytest.mark.parametrize(
    ("key", "expected"),
    [("dtype", (0, 65535)), ([100, 900], (100, 900)), ("percentiles", None), ("auto", (0, 4095))],
)
def test_the_range_may_be_given(tmp_path: Path, key: Any, expected: tuple[float, float] | None) -> None:
    root = images(tmp_path / "data", twelve_bits, "png")
    found = opened(root, range=key).value_range
    assert found is not None
    if expected is not None:
        assert found == expected
    else:
        assert 0 <= found[0] < 200
        assert 1800 < found[1] <= 4000
    shown = np.asarray(opened(root, range=key).open_image(0))
    assert shown.min() >= 0
    assert shown.max() <= 1


@pytest.mark.parametrize("key", [[5, 5], [9, 1], [1], ["a", 2], "wide"])
def test_a_range_that_is_none_is_told(tmp_path: Path, key: Any) -> None:
    with pytest.raises(ValidationError):
        folder.Config(name="folder", path=str(tmp_path), range=key)


def test_a_table_has_the_range_of_its_own_files(tmp_path: Path) -> None:
    images(tmp_path, twelve_bits, "png")
    (tmp_path / "t.csv").write_text("path\n" + "".join(f"{kind}/{i}.png\n" for kind in "ab" for i in range(6)))
    source = table.Config(name="table", path=str(tmp_path / "t.csv")).open("train")
    assert source is not None
    assert source.value_range == (0, 4095)


def test_prepare_says_the_range_and_caches_no_image_that_would_lose_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root = images(tmp_path / "data", twelve_bits, "png")
    prepare(str(root), str(tmp_path / "out"), cache_side=8)
    assert "more than 8 bits: 12 images, of which 0 is black and 4095 white" in capsys.readouterr().out
    source = opened(root, prepared=str(tmp_path / "out"), cache=True)
    assert source.open_image(0).mode == "F"
    assert "not in its cache" not in caplog.text


def test_what_an_encoder_was_pretrained_at_holds_in_stage_two_and_after(tmp_path: Path) -> None:
    root = images(tmp_path / "data", twelve_bits, "png", 20)
    dark = images(tmp_path / "dark", lambda i: twelve_bits(0) // 8, "png", 20)
    assert opened(dark).value_range == (0, 255)
    words = ["tracking=off", "num_workers=0", "data=folder"]
    tiny = [
        "transform=small",
        "transform.size=8",
        "backbone.width=4",
        "batch_size=8",
        "steps=2",
        "evaluate_every=0 steps",
    ]
    run = pretrain(load("pretrain", PretrainConfig, [*words, *tiny, f"data.path={root}", f"output={tmp_path / 'one'}"]))
    assert load_encoder(run)[1].blueprint.range == (0, 4095)
    embed = load("embed", EmbedConfig, [f"encoder={run}", "data=folder", f"data.path={dark}"])
    assert {source.value_range for source in open_sources(embed, "all").values()} == {(0.0, 4095.0)}
    two = [*words, f"data.path={dark}", f"encoder={run}", "regime=frozen", f"output={tmp_path / 'two'}"]
    model = open_predictor(finetune(load("finetune", FinetuneConfig, two)).folder)
    assert isinstance(model, Model)
    assert model.value_range == (0, 4095)
    whole, seen = model, list[float]()

    class Watched:
        gives, classes, channels, value_range = whole.gives, whole.classes, whole.channels, whole.value_range

        def predict(self, images: list[Image.Image]) -> Any:
            seen.extend(float(np.asarray(image).max()) for image in images)
            return whole.predict(images)

    list(predict(Watched(), [dark / "a" / "0.png"]))
    with Image.open(dark / "a" / "0.png") as stored:
        assert seen == [pytest.approx(np.asarray(stored).max() / 4095)]


def png_of_16_bits(path: Path) -> None:
    """A color PNG of 16 bits, which Pillow reads and does not write."""
    values = DRAWS.integers(0, 4096, (8, 8, 3)).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))


def tiff_of_bands(path: Path, bands: int, dtype: str) -> None:
    values = DRAWS.integers(0, 200, (8, 8, bands)).astype(dtype)
    data, bits = values.tobytes(), values.dtype.itemsize * 8
    place = 8 + len(data)
    data += struct.pack(f"<{bands}H", *[bits] * bands)
    extra = 8 + len(data)
    data += struct.pack(f"<{bands - 3}H", *[0] * (bands - 3)) if bands > 5 else b""
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, bands, place), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 8),
            (277, 3, 1, bands), (278, 3, 1, 8), (279, 4, 1, values.nbytes), (284, 3, 1, 1),
            (338, 3, bands - 3, extra if bands > 5 else 0)]  # fmt: skip
    written = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags))
    for tag, kind, count, value in tags:
        short = kind == 3 and count <= 2
        written += struct.pack("<HHI", tag, kind, count) + struct.pack(
            "<HH" if short else "<I", *((value, 0) if short else (value,))
        )
    path.write_bytes(written + struct.pack("<I", 0))


@pytest.mark.parametrize(("bands", "dtype"), [(4, "uint8"), (5, "uint8"), (8, "uint16")])
def test_images_of_more_bands_are_refused_by_name(tmp_path: Path, bands: int, dtype: str) -> None:
    for i in range(3):
        tiff_of_bands(tmp_path / f"{i}.tif", bands, dtype)
    with pytest.raises(ConfigError, match=rf"0\.tif: it has {bands} bands.*colors of 8 bits are read"):
        opened(tmp_path)


def test_colors_of_16_bits_say_that_8_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(3):
        png_of_16_bits(tmp_path / f"{i}.png")
    assert check_header(tmp_path / "0.png").mode == "RGB;16"
    prepare(str(tmp_path))
    assert "3 RGB;16 (the upper 8 of 16 bits are read)" in capsys.readouterr().out
    opened(tmp_path)
    assert "3 images hold colors of 16 bits" in caplog.text


def test_colours_of_16_bits_are_said_of_rows_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [tmp_path / f"{i}.png" for i in range(6)]
    for file in files:
        png_of_16_bits(file)
    in_rows(tmp_path, files).open("train")
    assert "colors of 16 bits, of which Pillow reads the upper 8" in caplog.text


def test_arrays_of_any_number_of_channels_have_no_range() -> None:
    assert ArrayDataset("arrays", torch.zeros(2, 5, 4, 4, dtype=torch.uint8)).value_range is None
