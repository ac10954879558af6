"""Which files of a folder are images, for training, prediction and masks alike; and a class that loses all of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.bad_files import warn_once
from ssl_pipeline.data.image_files import FileDataset, scan_folder
from ssl_pipeline.data.scan import ENDINGS, images_in
from ssl_pipeline.data.sources import domain_folder, folder
from ssl_pipeline.export.predict import image_files


def picture(path: Path, form: str = "png") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), "red").save(path, form)
    return path


def trained_on(root: Path) -> list[str]:
    scan_folder.cache_clear()
    folder._scan.cache_clear()
    source = folder.Config(name="folder", path=str(root)).open("train")
    assert isinstance(source, FileDataset)
    return [source.describe(i) for i in range(len(source))]


@pytest.mark.parametrize(
    ("ending", "form"),
    [
        ("avif", "avif"),
        ("jfif", "jpeg"),
        ("jpe", "jpeg"),
        ("jp2", "jpeg2000"),
        ("JPG", "jpeg"),
        ("mpo", "mpo"),
        ("tga", "tga"),
    ],
)
def test_what_pillow_reads_is_read_whatever_it_ends_in(tmp_path: Path, ending: str, form: str) -> None:
    files = [picture(tmp_path / f"{i}.{ending}", form) for i in range(3)]
    assert trained_on(tmp_path) == [str(file) for file in files]
    assert images_in(tmp_path) == files


def test_formats_that_other_programs_read_are_not(tmp_path: Path) -> None:
    assert not ENDINGS & {".eps", ".ps", ".wmf", ".h5", ".mpg", ".pdf"}
    for name in ("plain", "page.eps"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "eps")
    assert images_in(tmp_path) == []


def test_training_and_prediction_walk_alike(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    expected = [picture(root / name) for name in ("a.PNG", "b", "sub/c.png", "x.jpg/d.png")]
    outside = picture(tmp_path / "real" / "e.png")
    for name in ("._a.png", ".hidden/h.png", "__MACOSX/m.png"):
        picture(root / name)
    (root / "README").write_text("no image")
    (root / "notes.txt").write_text("neither")
    (root / "link").symlink_to(outside.parent)
    (root / "sub" / "loop").symlink_to(root)
    expected.append(root / "link" / "e.png")
    assert trained_on(root) == sorted(str(file) for file in expected)
    assert sorted(map(str, image_files([str(root)]))) == sorted(str(file) for file in expected)


def spoil(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no image")


@pytest.mark.parametrize(
    ("name", "told"),
    [("{}.heic", "12 end in .heic, which is not read"), ("{}.jpg", "12 can't be read: it is no image of a known format"),
     ("{}", "12 have no ending and hold no image")],
)  # fmt: skip
@pytest.mark.parametrize("source", ["folder", "domain_folder"])
def test_a_class_that_loses_all_its_files_is_an_error_with_the_cause(
    tmp_path: Path, name: str, told: str, source: str
) -> None:
    above = tmp_path / "ink" if source == "domain_folder" else tmp_path
    for i in range(12):
        spoil(above / "dog" / name.format(i))
        picture(above / "cat" / f"{i}.png")
        picture(above / "fox" / f"{i}.png")
    module: Any = {"folder": folder, "domain_folder": domain_folder}[source]
    with pytest.raises(ConfigError) as error:
        module.Config(name=source, path=str(tmp_path), max_bad_files="50%").open("train")
    assert told in str(error.value)
    assert "dog" in str(error.value)


def test_texts_beside_the_classes_are_no_class_and_empty_folders_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    for i in range(5):
        picture(tmp_path / "cat" / f"{i}.png")
        picture(tmp_path / "dog" / f"{i}.png")
        spoil(tmp_path / "annotations" / f"{i}.xml")
    (tmp_path / "fox").mkdir()
    source = folder.Config(name="folder", path=str(tmp_path)).open("train")
    assert source is not None
    assert source.classes == ("cat", "dog")
    assert "fox hold no image" in caplog.text


def test_a_folder_without_any_image_says_why_for_each_cause(tmp_path: Path) -> None:
    for name in ("a.heic", "b.heic", "c.cr2", "d"):
        spoil(tmp_path / name)
    with pytest.raises(ConfigError) as error:
        folder.Config(name="folder", path=str(tmp_path)).open("train")
    for told in ("2 end in .heic", "1 end in .cr2", "1 have no ending"):
        assert told in str(error.value)
