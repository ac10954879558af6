"""Preparing a folder: an exact report of whatever people keep in one, a manifest, a cache, and runs that read them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data import image_files, scan
from ssl_pipeline.data.cache import COLUMNS as CACHE_COLUMNS
from ssl_pipeline.data.cache import Cache, CacheError, cache_folder
from ssl_pipeline.data.image_files import FileDataset
from ssl_pipeline.data.image_index import FILE_NAME, FORMAT, FileTable, ImageIndex, index_folder
from ssl_pipeline.data.loader import DistInfo, IndexedLoader, read_crops
from ssl_pipeline.data.prepare import BAD_FILES, Report, prepare
from ssl_pipeline.data.scan import index_images
from ssl_pipeline.data.sources import folder as sources_folder
from ssl_pipeline.data.sources.folder import Config
from tests.runs import ssl_pipeline
from tests.unit.test_loader import FIRST, photos, views

OLD = 10**9  # seconds: no file of a test is so new that its time says nothing


def aged(root: Path) -> Path:
    """As if nothing had been touched for years."""
    for path in [*root.rglob("*"), root]:
        os.utime(path, (OLD, OLD), follow_symlinks=not path.is_symlink())
    return root


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A folder of two classes with one of everything that people keep in such folders."""
    root = tmp_path / "zoo"
    for name, first in (("cat", 0), ("dog", 8)):
        photos(root / name, 8)
        for i, file in enumerate(sorted((root / name).iterdir())):
            photo = photos(tmp_path / "made", first + i + 1)[-1]
            shutil.copy(tmp_path / "made" / photo, file)
    whole = (root / "cat" / "000.jpg").read_bytes()
    (root / "cat" / "empty.jpg").touch()
    (root / "cat" / "text.jpg").write_text("no image")
    (root / "cat" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "cat" / "gone.png").symlink_to("nowhere.png")
    (root / "dog" / "loop.png").symlink_to("loop.png")
    (root / "dog" / "up").symlink_to(root)
    rotten = bytearray(whole)
    rotten[len(whole) // 2] ^= 0x10
    (root / "cat" / "rot.jpg").write_bytes(rotten)
    ramp = np.linspace(0, 65535, 4096).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(root / "dog" / "deep.png")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(root / "dog" / "float.tif")
    Image.new("CMYK", (64, 64), (9, 200, 30, 0)).save(root / "dog" / "print.jpg")
    Image.new("P", (64, 64), 3).save(root / "dog" / "palette.png")
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    frames[0].save(root / "dog" / "film.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40), "green").save(root / "dog" / "turned.jpg", exif=exif)
    Image.new("RGBA", (64, 64), (1, 2, 3, 100)).save(root / "dog" / "čeština 写真.png")
    shutil.copy(root / "cat" / "001.jpg", root / "cat" / "again.jpg")
    shutil.copy(root / "cat" / "002.jpg", root / "dog" / "in two classes.jpg")
    (root / "fox").mkdir()
    (root / "fox" / "notes.txt").write_text("no image")
    return aged(root)


FAULTS = {
    "cat/empty.jpg": "it is empty",
    "cat/text.jpg": "it is no image of a known format",
    "cat/cut.jpg": "image file is truncated",
    "cat/gone.png": "it is not there (a broken link?)",
    "dog/loop.png": "",
}


def test_the_report_of_a_zoo_is_exact(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.lstat().st_mtime_ns for path in zoo.rglob("*")}
    usable = prepare(str(zoo), str(tmp_path / "out"))
    assert {path: path.lstat().st_mtime_ns for path in zoo.rglob("*")} == before
    manifest = ImageIndex.load(index_folder(zoo, tmp_path / "out"), zoo)
    assert manifest is not None
    report = Report(manifest)
    assert set(report.bad) == set(FAULTS)
    assert all(FAULTS[file] in fault for file, fault in report.bad.items())
    assert report.usable == usable == len(manifest.files) - 5 == 16 + 1 + 7 + 2
    assert report.repeated == [["cat/001.jpg", "cat/again.jpg"], ["cat/002.jpg", "dog/in two classes.jpg"]]
    assert report.disagreeing == [["cat/002.jpg", "dog/in two classes.jpg"]]
    assert (report.classes, report.empty) == (["cat", "dog"], ["fox"])
    told = capsys.readouterr().out
    for text in (
        "usable", "26", "cat/text.jpg: it is no image", "1 I;16 (16 bits)", "1 F (floats)",
        "1 CMYK (to RGB)", "2 P (by its palette)", "animated: 1 (the first frame is taken)", "rotated: 1", "transparent: 1",
        "labels disagree: 1 images lie in several classes", "without a usable image: fox", "ignored: 1 files",
    ):  # fmt: skip
        assert text in told
    lines = (index_folder(zoo, tmp_path / "out") / BAD_FILES).read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == sorted(FAULTS)


def test_a_bomb_and_a_forbidden_file_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path / "in", 4)
    Image.new("L", (500, 500)).save(tmp_path / "in" / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    whole = Path.read_bytes

    def guarded(path: Path) -> bytes:
        if path.name == "001.jpg":  # tests may run as a user who may read everything
            raise PermissionError(13, "Permission denied")
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", guarded)
    assert prepare(str(tmp_path / "in"), str(tmp_path / "out")) == 3
    manifest = ImageIndex.load(index_folder(tmp_path / "in", tmp_path / "out"), tmp_path / "in")
    assert manifest is not None
    bad = Report(manifest).bad
    assert "scale it down" in bad["large.png"]
    assert "this user may not read it" in bad["001.jpg"]


def test_nothing_usable_leaves_with_2(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_text("text")
    done = ssl_pipeline("prepare", tmp_path / "in", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "holds 0 usable images" in done.stderr
    assert "it is no image of a known format" in done.stdout
    photos(tmp_path / "in", 2)
    done = ssl_pipeline("prepare", tmp_path / "in", "--output", tmp_path / "out", "--cache", "32")
    assert done.returncode == 0
    assert "cache: 2 images" in done.stdout
    assert "data.cache=true" in done.stdout


def test_the_output_must_lie_elsewhere(tmp_path: Path) -> None:
    photos(tmp_path, 3)
    with pytest.raises(ConfigError, match="nothing is changed"):
        prepare(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="can't be written"):
        prepare(str(tmp_path), "/dev/null/out")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose headers or pixels are looked at from now on."""
    seen = list[str]()
    whole = scan._check_file

    def find(path: Path, level: int, cache_side: int) -> Any:
        seen.append(path.name)
        return whole(path, level, cache_side)

    monkeypatch.setattr(scan, "_check_file", find)
    return seen


def test_a_later_start_looks_at_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, place = tmp_path / "in", tmp_path / "out"
    photos(root, 5)
    aged(root)
    index_images(root, place)
    seen = counted(monkeypatch)
    assert list(index_images(root, place).files) == [f"{i:03}.jpg" for i in range(5)]
    assert seen == []
    shutil.copy(root / "000.jpg", root / "new.jpg")
    (root / "004.jpg").unlink()
    assert list(index_images(root, place).files) == ["000.jpg", "001.jpg", "002.jpg", "003.jpg", "new.jpg"]
    assert seen == ["new.jpg"]
    os.utime(root, (OLD, OLD))
    photos(root, 1, 50, 40)  # overwritten in place: seen by `prepare`, which looks at every file
    os.utime(root / "000.jpg", (OLD + 1, OLD + 1))
    os.utime(root, (OLD, OLD))
    seen.clear()
    assert index_images(root, place, reuse=False).columns["width"][0] == 50
    assert "000.jpg" in seen


def test_a_stopped_look_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, place = tmp_path / "in", tmp_path / "out"
    photos(root, 12)
    aged(root)
    monkeypatch.setattr(scan, "_CHUNK", 4)
    whole = scan._check_file

    def fail(path: Path, level: int, cache_side: int) -> Any:
        if path.name == "009.jpg":
            raise KeyboardInterrupt
        return whole(path, level, cache_side)

    monkeypatch.setattr(scan, "_check_file", fail)
    with pytest.raises(KeyboardInterrupt):
        index_images(root, place, cache_side=16)
    monkeypatch.setattr(scan, "_check_file", whole)
    half = ImageIndex.load(place, root)
    assert half is not None
    assert not half.whole
    seen = counted(monkeypatch)
    manifest = index_images(root, place, cache_side=16)
    assert manifest.whole
    assert 3 <= len(seen) <= 4
    cache = Cache(cache_folder(place, 16))
    for i in range(12):
        assert cache.read(manifest.files.row(i, tuple(CACHE_COLUMNS))).size == (24, 16)


def test_bit_rot_is_found_by_its_digest(tmp_path: Path) -> None:
    root, place = tmp_path / "in", tmp_path / "out"
    photos(root, 4)
    aged(root)
    index_images(root, place, pixels=True)
    damaged = bytearray((root / "002.jpg").read_bytes())
    damaged[-30] ^= 1
    (root / "002.jpg").write_bytes(damaged)
    aged(root)
    assert not Report(index_images(root, place, pixels=True)).bad
    for _ in range(2):
        bad = Report(index_images(root, place, pixels=True, recheck=True)).bad
        assert list(bad) == ["002.jpg"]
        assert "bytes have changed while its size and time have not" in bad["002.jpg"]


@pytest.mark.parametrize("damage", ["cut", "format", "other root", "gone"])
def test_a_manifest_that_is_none_is_made_anew(tmp_path: Path, damage: str) -> None:
    root, place = tmp_path / "in", tmp_path / "out"
    photos(root, 3)
    aged(root)
    index_images(root, place)
    path = place / FILE_NAME
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    if damage == "format":
        path.write_bytes(path.read_bytes().replace(f'\\"format\\": {FORMAT}'.encode(), b'\\"format\\": 0'))
    if damage == "gone":
        path.unlink()
    if damage == "other root":
        root = root.rename(tmp_path / "moved")
    assert ImageIndex.load(place, root) is None
    assert len(index_images(root, place).files) == 3


def test_where_nothing_can_be_written_a_start_still_works(tmp_path: Path) -> None:
    photos(tmp_path, 3)
    assert list(index_images(tmp_path, Path("/dev/null/x")).files) == ["000.jpg", "001.jpg", "002.jpg"]


def test_many_files_are_announced_where_no_bar_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path / "photos", 3)
    monkeypatch.setattr("ssl_pipeline.data.scan._MANY", 3)
    for told in ("checking 3 files of ", ""):
        opened(aged(tmp_path / "photos"))
        assert capsys.readouterr().err[: len(told) or None] == told


def opened(root: Path, **keys: Any) -> FileDataset:
    for looked in (image_files.scan_folder, sources_folder._scan):
        looked.cache_clear()
    source = Config(name="folder", path=str(root), **keys).open("train")
    assert isinstance(source, FileDataset)
    return source


def test_training_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "in"
    photos(root, 6, 640, 480)
    Image.new("L", (300, 200), 77).save(root / "grayscale.png")
    aged(root)
    with pytest.raises(ConfigError, match="no cache of decoded images yet"):
        opened(root, cache=True, prepared=str(tmp_path / "out"))
    prepare(str(root), str(tmp_path / "out"), cache_side=100)
    files = opened(root, prepared=str(tmp_path / "out"))
    cached = opened(root, prepared=str(tmp_path / "out"), cache=True)
    assert files.fingerprint() == cached.fingerprint()
    assert cached.open_image(0).size == (133, 100)
    assert cached.open_image(6).getpixel((3, 3)) == (77, 77, 77)
    index = torch.arange(6)
    from_files = read_crops(files, views(crop={"scale": (0.5, 1.0)}), FIRST, index).views
    monkeypatch.setattr("ssl_pipeline.data.image_files.decode", None)  # no file is opened from here on
    from_cache = read_crops(cached, views(crop={"scale": (0.5, 1.0)}), FIRST, index).views
    for one, other in zip(from_files, from_cache, strict=True):
        assert (one.float() - other.float()).abs().mean() < 3  # the same crops of the same images


def test_a_damaged_cache_gives_way_to_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "in"
    photos(root, 3)
    aged(root)
    prepare(str(root), str(tmp_path / "out"), cache_side=32)
    place = cache_folder(index_folder(root, tmp_path / "out"), 32)
    shard = place / "00000.bin"
    data = bytearray(shard.read_bytes())
    data[5] ^= 255
    shard.write_bytes(data[:-1])
    source = opened(root, prepared=str(tmp_path / "out"), cache=True)
    assert [source.open_image(i).size for i in range(3)] == [(96, 64), (48, 32), (96, 64)]
    assert "is damaged at byte 0" in caplog.text
    row = {"shard": 9, "offset": 0, "cached_width": 4, "cached_height": 4, "cached_channels": 3, "crc": 0}
    with pytest.raises(CacheError, match="can't be read"):
        Cache(place).read(row)


def test_images_that_the_cache_lacks_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "in"
    photos(root, 3)
    aged(root)
    prepare(str(root), str(tmp_path / "out"), cache_side=32)
    photos(root, 5)
    aged(root)
    os.utime(root, (OLD + 9, OLD + 9))
    source = opened(root, prepared=str(tmp_path / "out"), cache=True)
    assert [source.open_image(i).size for i in (0, 4)] == [(48, 32), (96, 64)]
    assert f"2 of 5 images in {root} are not in its cache" in caplog.text
    assert "--cache 32" in caplog.text


def test_shards_and_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, place = tmp_path / "in", tmp_path / "out"
    photos(root, 5)
    aged(root)
    monkeypatch.setattr("ssl_pipeline.data.cache.SHARD_BYTES", 2000)
    index_images(root, place, cache_side=16)
    assert len(list((place / "cache-16").glob("*.bin"))) == 3
    assert index_images(root, place).cache_side == 16
    manifest = index_images(root, place, cache_side=20)
    assert manifest.cache_side == 20
    assert manifest.columns["cached_height"].tolist() == [20] * 5


def test_a_prepared_zoo_trains_and_a_raw_one_does_as_told(zoo: Path, tmp_path: Path) -> None:
    source = opened(zoo, max_bad_files="20%", prepared=str(tmp_path / "raw"))
    assert source.bad_files is not None
    assert len(source.bad_files.faults) == 4  # the truncated one has a good header
    made = IndexedLoader(source, views(), 4, 0, DistInfo(0, 1, torch.device("cpu")), 16, 0)
    assert len(list(made.from_step(0))) == 16
    with pytest.raises(ConfigError) as told:
        opened(zoo, max_bad_files="3", prepared=str(tmp_path / "raw"))
    assert all(Path(file).name in str(told.value) for file in FAULTS if file != "cat/cut.jpg")
    prepare(str(zoo), str(tmp_path / "ready"))
    ready = opened(zoo, max_bad_files="20%", prepared=str(tmp_path / "ready"))
    assert ready.bad_files is not None
    assert {Path(file).name for file in ready.bad_files.faults} == {Path(file).name for file in FAULTS}


def test_split_folders_are_prepared_each(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            photos(tmp_path / "in" / part / name, 3)
    assert prepare(str(tmp_path / "in"), str(tmp_path / "out")) == 12
    assert all(
        ImageIndex.load(index_folder(tmp_path / "in" / p, tmp_path / "out"), tmp_path / "in" / p)
        for p in ("train", "test")
    )


def test_names_are_kept_byte_for_byte() -> None:
    names = ["a.jpg", "", "写真/č.png", os.fsdecode(b"not \xff utf-8.png"), "z"]
    files = FileTable.of(names)
    assert list(files) == [files[i] for i in range(5)] == names
    assert list(files.select(torch.tensor([4, 0, 3]))) == ["z", "a.jpg", names[3]]
    assert list(files.select(torch.tensor([], dtype=torch.int64))) == list(FileTable.of([])) == []
    assert files.select(torch.tensor([2, 2])) == [names[2]] * 2
    assert files.column("name").tolist() == [os.fsencode(name) for name in names]


def test_a_million_files_need_no_strings(tmp_path: Path) -> None:
    """The arrays of a selection are those of the whole: what it adds is its own numbers alone."""
    photos(tmp_path / "in", 4)
    files = index_images(tmp_path / "in", tmp_path / "out").files
    some = files.select(torch.tensor([3, 1])).select(torch.tensor([1]))
    assert list(some) == ["001.jpg"]
    assert some.columns["name"] is files.columns["name"]
    assert some[-1] == "001.jpg"
    assert some == ["001.jpg"]
    assert some != ["002.jpg"]
    with pytest.raises(IndexError):
        some[1]


def shards(place: Path, side: int) -> list[str]:
    return sorted(path.name for path in cache_folder(place, side).glob("*.bin"))


def test_old_shards_are_deleted_when_nobody_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    photos(root, 5)
    aged(root)
    place = index_folder(root, out)
    monkeypatch.setattr("ssl_pipeline.data.cache.SHARD_BYTES", 4000)
    prepare(str(root), str(out), cache_side=32)
    assert shards(place, 32) == ["00000.bin", "00001.bin", "00002.bin", "00003.bin", "00004.bin"]
    running = opened(root, prepared=str(out), cache=True)
    before = [running.open_image(i).tobytes() for i in range(2)]  # its other shards are not mapped yet
    prepare(str(root), str(out), cache_side=32, recheck=True)
    assert len(shards(place, 32)) == 10
    assert "5 old shards may be in use and stay" in caplog.text
    monkeypatch.setattr("ssl_pipeline.data.image_files.decode", None)
    now = [running.open_image(i).tobytes() for i in range(5)]
    assert now[:2] == before
    del running
    prepare(str(root), str(out))
    assert shards(place, 32) == ["00005.bin", "00006.bin", "00007.bin", "00008.bin", "00009.bin"]
    assert [opened(root, prepared=str(out), cache=True).open_image(i).tobytes() for i in range(5)] == now


def test_another_side_takes_the_old_ones_place_and_nothing_else_is_deleted(tmp_path: Path) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    photos(root, 3)
    aged(root)
    place = index_folder(root, out)
    prepare(str(root), str(out), cache_side=16)
    theirs = [cache_folder(place, 16) / "00000.bin.bak", place / "cache-old" / "00000.bin", place / "00000.bin"]
    theirs[1].parent.mkdir()
    for path in theirs:
        path.write_text("not ours")
    linked = cache_folder(place, 16) / "00007.bin"
    linked.symlink_to(theirs[2])
    prepare(str(root), str(out), cache_side=24)
    assert all(path.read_text() == "not ours" for path in [*theirs, linked])
    assert shards(place, 16) == [linked.name]
    assert shards(place, 24) == ["00000.bin"]
    prepare(str(root), str(out), cache_side=20)
    assert not cache_folder(place, 24).exists()


def test_a_cache_that_was_made_anew_in_between_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    photos(root, 4)
    aged(root)
    prepare(str(root), str(out), cache_side=32)
    config = Config(name="folder", path=str(root), prepared=str(out), cache=True)
    image_files.scan_folder.cache_clear()
    sources_folder._scan.cache_clear()
    assert config.open("train") is not None
    prepare(str(root), str(out), cache_side=32, recheck=True)
    late = config.open("train")  # by what this process saw at first
    assert late is not None
    assert [late.open_image(i).size for i in range(4)] == [(96, 64)] * 4
    assert [record.message for record in caplog.records if "cache" in record.message] == [
        f"4 of 4 images in {root} are not in its cache, and are decoded anew each time: `ssl-pipeline prepare {root} --cache 32 "
        f"--output {out}` adds those below it."
    ]
    for path in cache_folder(index_folder(root, out), 32).glob("*.bin"):
        path.unlink()
    prepare(str(root), str(out), cache_side=32)
    assert opened(root, prepared=str(out), cache=True).open_image(0).size == (48, 32)
