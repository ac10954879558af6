"""Domain folders and tables read what `prepare` has found: verdicts, sizes and the cache, and start without it as ever."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data import image_files
from ssl_pipeline.data.image_files import FileDataset
from ssl_pipeline.data.image_index import ImageIndex, index_folder
from ssl_pipeline.data.loader import DistInfo, IndexedLoader, read_crops
from ssl_pipeline.data.prepare import Report, prepare
from ssl_pipeline.data.sources import domain_folder, table
from ssl_pipeline.data.targets import NumericTargets
from tests.runs import ssl_pipeline
from tests.unit.test_loader import FIRST, photos, views
from tests.unit.test_prepare import OLD, aged, counted


@pytest.fixture(autouse=True)
def _anew() -> None:
    """A folder is looked at once in a process's life; here a test is one."""
    image_files.scan_folder.cache_clear()
    domain_folder._scan.cache_clear()
    table._read.cache_clear()


@pytest.fixture
def domains(tmp_path: Path) -> Path:
    """Two domains of two classes, 24 photos that all differ, one of them cut off and one a text."""
    root = tmp_path / "domains"
    names = iter(photos(tmp_path / "made", 24, 96, 64))
    for place in ("ink/cat", "ink/dog", "oil/cat", "oil/dog"):
        (root / place).mkdir(parents=True)
        for i in range(6):
            shutil.copy(tmp_path / "made" / next(names), root / place / f"{i}.jpg")
    cut = root / "ink" / "cat" / "0.jpg"
    cut.write_bytes(cut.read_bytes()[:900])
    (root / "oil" / "dog" / "5.jpg").write_text("no image")
    (root / "oil" / "fox").mkdir()
    shutil.copy(root / "oil" / "cat" / "1.jpg", root / "oil" / "dog" / "1.jpg")
    Image.new("RGB", (9, 9)).save(root / "ink" / "outside.png")
    return aged(root)


def of_domains(root: Path, split: Any = "train", **keys: Any) -> FileDataset:
    source = domain_folder.Config(name="domain_folder", path=str(root), max_bad_files="20%", **keys).open(split)
    assert isinstance(source, FileDataset)
    return source


def of_table(path: Path, **keys: Any) -> FileDataset:
    keys = {"max_bad_files": "20%", "label_column": None, **keys}
    source = table.Config(name="table", path=str(path), **keys).open("train")
    assert isinstance(source, FileDataset)
    return source


def written(path: Path, names: list[str]) -> Path:
    path.write_text("\n".join(["path", *names]) + "\n")
    return path


def files_of(root: Path) -> list[str]:
    return sorted(file.relative_to(root).as_posix() for file in root.rglob("*.jpg"))


def test_a_domain_folder_is_looked_at_once(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"prepared": str(tmp_path / "out")}
    first = of_domains(domains, **keys)
    assert first.bad_files is not None
    assert list(first.bad_files.faults) == [str(domains / "oil/dog/5.jpg")]  # the one that is cut off has a good header
    image_files.scan_folder.cache_clear()
    domain_folder._scan.cache_clear()
    seen = counted(monkeypatch)
    again = of_domains(domains, **keys)
    assert seen == []
    assert again.fingerprint() == first.fingerprint()
    assert torch.equal(again.sizes(torch.arange(len(again)))[0], torch.full((len(again),), 64))
    with pytest.raises(ConfigError, match=r"(?s)oil/dog/5\.jpg: it is no image.*1 of 24 files"):
        domain_folder.Config(name="domain_folder", path=str(domains), max_bad_files="0", **keys).open("train")


def test_a_prepared_domain_folder_trains_from_its_cache(
    domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = {"prepared": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match=r"prepare \S+ --data domain_folder --cache 256 --output"):
        of_domains(domains, cache=True, **out)
    image_files.scan_folder.cache_clear()
    domain_folder._scan.cache_clear()
    assert prepare(str(domains), str(tmp_path / "out"), cache_side=48, kind="domain_folder") == 23
    ready = of_domains(domains, cache=True, **out)
    assert ready.bad_files is not None
    assert {Path(file).name for file in ready.bad_files.faults} == {"0.jpg", "5.jpg"}
    assert ready.classes == ("cat", "dog")
    assert ready.domain_names == ("ink", "oil")
    assert ready.labels is not None
    assert ready.domains is not None
    for file, label, domain in zip(ready.files, ready.labels.tolist(), ready.domains.tolist(), strict=True):
        assert file.startswith(f"{ready.domain_names[domain]}/{ready.classes[label]}/")
    index = torch.arange(8)
    large = views(crop={"scale": (0.5, 1.0)})
    from_files = read_crops(of_domains(domains, **out), large, FIRST, index).views
    monkeypatch.setattr("ssl_pipeline.data.image_files.decode", None)  # no file is opened from here on
    for one, other in zip(from_files, read_crops(ready, large, FIRST, index).views, strict=True):
        assert (one.float() - other.float()).abs().mean() < 3


def test_the_report_of_a_domain_folder_is_exact(domains: Path, tmp_path: Path) -> None:
    prepare(str(domains), str(tmp_path / "out"), kind="domain_folder")
    manifest = ImageIndex.load(index_folder(domains, tmp_path / "out"), domains)
    assert manifest is not None
    report = Report(manifest, "domain_folder")
    assert (report.classes, report.empty, report.outside) == (["cat", "dog"], ["oil/fox"], 1)
    assert report.disagreeing == [["oil/cat/1.jpg", "oil/dog/1.jpg"]]
    assert any("1 images lie at no domain/class" in remark for remark in report.remarks())
    plain = Report(manifest, "table")
    assert (plain.classes, plain.empty, plain.disagreeing) == ([], [], [])
    assert Report(manifest).disagreeing == []  # as class folders `ink` and `oil` agree


def test_a_table_whose_folder_nobody_has_looked_at_starts_as_ever(
    domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = counted(monkeypatch)
    source = of_table(written(tmp_path / "t.csv", files_of(domains)), root=str(domains))
    assert len(source) == 24
    assert seen == []
    assert not index_folder(domains).exists()
    with pytest.raises(ConfigError, match=r"holds no index of .*prepare \S+ --data table --output"):
        of_table(tmp_path / "t.csv", root=str(domains), prepared=str(tmp_path / "out"))


def test_a_table_honors_what_prepare_has_found(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = [file for file in files_of(domains) if file not in ("ink/cat/0.jpg", "oil/dog/5.jpg")]
    names = [str(domains / sound[0]), f"./{sound[1]}", *sound[2:]]
    unprepared = of_table(written(tmp_path / "sound.csv", names), root=str(domains))
    before = unprepared.fingerprint(), unprepared.sizes(torch.arange(4))
    prepare(str(domains), str(tmp_path / "out"), cache_side=48, kind="table")
    keys = {"root": str(domains), "prepared": str(tmp_path / "out")}
    asked = list[str]()
    is_file = Path.is_file

    def told(path: Path) -> bool:
        asked.append(path.name)
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", told)
    ready = of_table(written(tmp_path / "t.csv", [*names, "ink/cat/0.jpg", "oil/dog/5.jpg"]), cache=True, **keys)
    assert sorted(name for name in asked if name.endswith(".jpg")) == [
        "0.jpg",
        "5.jpg",
    ]  # the others are known to be there
    assert ready.files == names
    assert ready.bad_files is not None
    assert sorted(Path(file).name for file in ready.bad_files.faults) == ["0.jpg", "5.jpg"]
    assert ready.bad_files.files == 24
    assert ready.fingerprint() == before[0]
    assert all(torch.equal(a, b) for a, b in zip(ready.sizes(torch.arange(4)), before[1], strict=True))
    monkeypatch.setattr("ssl_pipeline.data.image_files.decode", None)
    assert [ready.open_image(i).size for i in (0, 1, 21)] == [(72, 48)] * 3
    with pytest.raises(ConfigError, match=r"(?s)ink/cat/0\.jpg: image file is truncated.*2 of 24"):
        of_table(tmp_path / "t.csv", max_bad_files="1", **keys)


def test_a_table_leaves_out_a_broken_files_targets_with_it(domains: Path, tmp_path: Path) -> None:
    prepare(str(domains), str(tmp_path / "out"), kind="table")
    rows = [f"{file},{number}" for number, file in enumerate(files_of(domains))]
    (tmp_path / "t.csv").write_text("\n".join(["path,value", *rows]))
    config = table.Config(
        name="table", path=str(tmp_path / "t.csv"), root=str(domains), prepared=str(tmp_path / "out"), max_bad_files="2",
        target_columns=("value",),
    )  # fmt: skip
    seen = set[int]()
    for split in ("train", "val", "test"):
        source = config.open(split)
        assert isinstance(source, FileDataset)
        assert isinstance(source.annotations, NumericTargets)
        values = [int(value) for value in source.annotations.values[:, 0]]
        assert [files_of(domains)[value] for value in values] == source.files
        seen |= set(values)
    assert len(seen) == 22


def test_a_table_may_name_files_that_the_manifest_lacks(domains: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "scan.img"  # another folder, and an ending that no look takes for an image's
    other.parent.mkdir()
    Image.new("RGB", (40, 30), "green").save(other, "PNG")
    prepare(str(domains), str(tmp_path / "out"), cache_side=48, kind="table")
    path = written(tmp_path / "t.csv", ["ink/cat/1.jpg", str(other), "ink/cat/../dog/1.jpg"])
    keys = {"root": str(domains), "prepared": str(tmp_path / "out"), "cache": True}
    source = of_table(path, **keys)
    assert [source.open_image(i).size for i in range(3)] == [(72, 48), (40, 30), (96, 64)]
    heights, widths = source.sizes(torch.arange(3))
    assert (heights.tolist(), widths.tolist()) == ([64, 30, 64], [96, 40, 96])
    assert source.fingerprint() == of_table(path, root=str(domains)).fingerprint()


def test_a_table_sees_what_has_changed_since(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(str(domains), str(tmp_path / "out"), kind="table")
    (domains / "oil" / "cat" / "3.jpg").unlink()
    shutil.copy(domains / "oil" / "cat" / "2.jpg", domains / "oil" / "cat" / "new.jpg")
    os.utime(domains / "oil" / "cat", (OLD + 9, OLD + 9))
    seen = counted(monkeypatch)
    keys = {"root": str(domains), "prepared": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match=r"(?s)oil/cat/3\.jpg\n1 of the 25 files.*are not there"):
        of_table(written(tmp_path / "t.csv", [*files_of(domains), "oil/cat/3.jpg"]), **keys)
    assert seen == ["new.jpg"]


def test_splits_of_a_table_are_one_folder_to_prepare(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for part in ("train", "test"):
        photos(root / part / "cat", 3)
    aged(root)
    done = ssl_pipeline("prepare", root, "--data", "table", "--output", tmp_path / "out", "--cache", "32")
    assert done.returncode == 0, done.stderr
    assert f"data=table data.path=TABLE data.root={root}" in done.stdout
    manifest = ImageIndex.load(index_folder(root, tmp_path / "out"), root)
    assert manifest is not None
    assert len(manifest.files) == 6
    source = of_table(written(tmp_path / "t.csv", list(manifest.files)), root=str(root), prepared=str(tmp_path / "out"),
                      cache=True)  # fmt: skip
    made = IndexedLoader(source, views(), 4, 0, DistInfo(0, 1, torch.device("cpu")), 3, 0)
    assert len(list(made.from_step(0))) == 3
