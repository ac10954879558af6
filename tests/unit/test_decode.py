"""Decoding: what files are stored as, what is wrong with them, and that a message names them. All files are real ones."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from ssl_pipeline.config.base import UserError
from ssl_pipeline.data.decode import DecodeError, Header, check_header, decode

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16
IN_8_BIT = np.rint(RAMP / 257)


def values(path: Path, channels: int = 1) -> np.ndarray:
    image = decode(path, channels)
    assert image.mode == ("L" if channels == 1 else "RGB")
    return np.asarray(image).astype(int)


def photo(path: Path, width: int = 80, height: int = 48) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((20, 40), np.uint8)
    upright[:10, :20] = 255  # the upper left quarter is white, and must be so again
    undo: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: np.transpose, 6: np.rot90, 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(undo[orientation](upright))
    Image.fromarray(stored).save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(values(tmp_path / "photo.png"), upright)
    header = check_header(tmp_path / "photo.png")
    assert (header.width, header.height, header.traits) == (40, 20, frozenset(["rotated"] if orientation > 1 else []))


@pytest.mark.parametrize("name", ["ramp.png", "ramp.tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_rescaled(tmp_path: Path, name: str, channels: int) -> None:
    Image.fromarray(RAMP).save(tmp_path / name)
    found = values(tmp_path / name, channels)
    for plane in [found] if channels == 1 else found.transpose(2, 0, 1):
        np.testing.assert_array_equal(plane, IN_8_BIT)


def test_a_16_bit_pgm_is_not_stretched(tmp_path: Path) -> None:
    dim = RAMP // 4
    (tmp_path / "ramp.pgm").write_bytes(b"P5\n64 64\n65535\n" + dim.astype(">u2").tobytes())
    np.testing.assert_array_equal(values(tmp_path / "ramp.pgm"), np.rint(dim / 257))


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (np.array([[0, 100, 255]], "float32"), [[0, 100, 255]]),  # 8-bit values
        (np.array([[0, 0.5, 1]], "float32"), [[0, 128, 255]]),  # shares of white
        (np.array([[-1000, 0, 1000]], "float32"), [[0, 128, 255]]),  # anything else: from least to greatest
        (np.array([[np.nan, np.inf, -np.inf, 0, 1]], "float32"), [[0, 255, 0, 0, 255]]),
        (np.array([[np.nan, np.nan]], "float32"), [[0, 0]]),
        (np.array([[7000, 7000]], "float32"), [[0, 0]]),
        (np.array([[0, 1, 255]], "int32"), [[0, 1, 255]]),
        (np.array([[0, 257, 65535]], "int32"), [[0, 1, 255]]),  # 16-bit values in 32
        (np.array([[0, 50_000, 100_000]], "int32"), [[0, 128, 255]]),
        (np.array([[-100, 0, 200]], "int32"), [[0, 85, 255]]),
    ],
)
def test_floats_and_32_bits_are_never_clipped(tmp_path: Path, stored: np.ndarray, expected: list[list[int]]) -> None:
    Image.fromarray(stored).save(tmp_path / "ramp.tiff")
    np.testing.assert_array_equal(values(tmp_path / "ramp.tiff"), expected)


def test_cmyk(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (255, 0, 0)).convert("CMYK").save(tmp_path / "red.jpg", quality=100)
    assert abs(values(tmp_path / "red.jpg", 3)[16, 16] - (255, 0, 0)).max() < 8
    assert abs(values(tmp_path / "red.jpg")[16, 16] - 76) < 8


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 255, 9, 9, 9])
    palette.putdata([0, 1])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert values(tmp_path / "palette.png", 3).tolist() == [[[0, 0, 255], [255, 255, 255]]]
    palette.save(tmp_path / "partly.png", transparency=bytes([255, 0]))
    assert values(tmp_path / "partly.png", 3).tolist() == [[[0, 0, 255], [255, 255, 255]]]
    Image.new("RGBA", (1, 1), (0, 0, 0, 51)).save(tmp_path / "rgba.png")
    assert values(tmp_path / "rgba.png", 3).tolist() == [[[204, 204, 204]]]
    Image.new("LA", (1, 1), (0, 0)).save(tmp_path / "la.png")
    assert values(tmp_path / "la.png").tolist() == [[255]]


def test_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "fax.png")
    assert values(tmp_path / "fax.png").tolist() == [[255, 0]]


@pytest.mark.parametrize("name", ["film.gif", "film.webp", "film.png"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (8, 6), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options: dict[str, Any] = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    found = values(tmp_path / name, 3)
    assert found.shape == (6, 8, 3)
    assert found[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("name", ["čeština ☃ 写真.jpg", "a\nb.jpg", "..x.jpg"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    assert decode(photo(tmp_path / name), 3).size == (80, 48)
    assert check_header(tmp_path / name) == Header(80, 48, "RGB")


@pytest.mark.parametrize("min_size", [1, 60, 128, 300, 512, 600, 5000])
def test_a_reduced_jpeg_is_never_smaller_than_asked(tmp_path: Path, min_size: int) -> None:
    path = photo(tmp_path / "large.jpg", 1203, 601)
    image = decode(path, 3, min_size)
    assert min(image.size) >= min(min_size, 601)
    assert min(image.size) < 601 or min_size > 300  # and it is reduced where it can be
    assert abs(image.width / image.height - 1203 / 601) < 0.02


def test_a_reduced_jpeg_is_rotated_and_grayscale(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (800, 400), (0, 255, 0)).save(tmp_path / "photo.jpg", exif=exif)
    image = decode(tmp_path / "photo.jpg", 1, 100)
    assert (image.mode, image.size) == ("L", (100, 200))
    assert abs(np.asarray(image).astype(int) - 150).max() <= 2


def test_min_size_leaves_other_formats_alone(tmp_path: Path) -> None:
    assert decode(photo(tmp_path / "a.png"), 3, 8).size == (80, 48)


def broken(folder: Path) -> dict[str, tuple[Path, str]]:
    """Per kind of damage a file, and what the message must say."""
    whole = photo(folder / "whole.jpg").read_bytes()
    png = photo(folder / "whole.png").read_bytes()
    made = {
        "truncated.jpg": (whole[: len(whole) // 2], "truncated"),
        "truncated.png": (png[: len(png) // 2], ""),
        "text.jpg": (b"this is no image\n", "no image of a known format"),
        "empty.jpg": (b"", "it is empty"),
        "page.jpg": (b"<html><body>404</body></html>", "no image of a known format"),
    }
    for name, (data, _) in made.items():
        (folder / name).write_bytes(data)
    return {name: (folder / name, fault) for name, (_, fault) in made.items()}


@pytest.mark.parametrize("kind", ["truncated.jpg", "truncated.png", "text.jpg", "empty.jpg", "page.jpg"])
def test_damage_is_told_with_the_file_and_the_remedy(tmp_path: Path, kind: str) -> None:
    path, fault = broken(tmp_path)[kind]
    with pytest.raises(DecodeError) as caught:
        decode(path, 3)
    assert str(path) in str(caught.value)
    assert fault in caught.value.fault
    assert "Remove or replace the file" in str(caught.value)
    assert isinstance(caught.value, UserError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.path, again.fault) == (str(caught.value), path, caught.value.fault)
    if not kind.startswith("truncated"):
        with pytest.raises(DecodeError) as caught:
            check_header(path)
        assert fault in caught.value.fault


def test_truncated_files_stay_errors() -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_links_pipes_and_folders(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name, fault in (
        ("broken", "a broken link?"),
        ("loop", ""),
        ("pipe", "no regular file"),
        ("folder", "no regular file"),
    ):
        with pytest.raises(DecodeError) as caught:
            check_header(tmp_path / f"{name}.jpg")
        assert fault in caught.value.fault
    with pytest.raises(DecodeError, match=r"broken\.jpg.*a broken link"):
        decode(tmp_path / "broken.jpg", 3)


def test_a_bomb_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = photo(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DecodeError, match=r"large\.png.*more than 2000 pixels.*scale it down"):
        decode(path, 3)
    with pytest.raises(DecodeError, match="scale it down"):
        check_header(path)


@pytest.mark.parametrize("error", [struct.error("unpack requires"), IndexError("list index"), RuntimeError()])
def test_whatever_a_decoder_raises_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    path = photo(tmp_path / "odd.png")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(DecodeError, match=r"odd\.png"):
        decode(path, 3)
    with pytest.raises(DecodeError, match=r"odd\.png"):
        check_header(path)


def test_want_of_memory_is_not_blamed_on_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    path = photo(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        decode(path, 3)
    with pytest.raises(MemoryError):
        check_header(path)
