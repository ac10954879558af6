"""Splits go by many names: a folder or row that is named for the test is never trained on, and never a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.bad_files import warn_once
from ssl_pipeline.data.image_files import FileDataset
from ssl_pipeline.data.sources import domain_folder, folder, mask_folder, table, webdataset
from ssl_pipeline.data.splits import resembles_split, split_named
from ssl_pipeline.downstream.classification import check_labels
from tests.shards import png, write_tar


def pictures(*folders: Path, count: int = 5) -> None:
    for place in folders:
        place.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (6, 5), (40 * i, 0, 0)).save(place / f"{i}.png")


def files(source: Any) -> set[str]:
    assert isinstance(source, FileDataset)
    return set(source.files)


@pytest.fixture(autouse=True)
def _said_again() -> None:
    warn_once.cache_clear()


@pytest.mark.parametrize(
    ("name", "split"),
    [("train", "train"), ("Training", "train"), (" TRAIN ", "train"), ("training_set", "train"), ("valid", "val"),
     ("Validation", "val"), ("VAL", "val"), ("eval", "val"), ("val", "val"), ("Testing", "test"), ("Test Set", "test"),
     ("cat", None), ("trainer", None), ("extra_test", None), ("set", None)],
)  # fmt: skip
def test_a_split_is_known_by_its_usual_names(name: str, split: str | None) -> None:
    assert split_named(name) == split
    assert resembles_split(name) == (split is not None or name == "extra_test")


@pytest.mark.parametrize("names", [("train", "valid"), ("train", "validation"), ("Train", "Test"), ("training", "testing"),
                                   ("train", "eval"), ("TRAIN", "Val", "test set")])  # fmt: skip
def test_folders_of_splits_are_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    pictures(*(tmp_path / name / kind for name in names for kind in ("cat", "dog")))
    config = folder.Config(name="folder", path=str(tmp_path))
    train = config.open("train")
    assert isinstance(train, FileDataset)
    assert train.classes == ("cat", "dog")
    assert train.root.name == names[0]
    test = config.open("test")
    assert isinstance(test, FileDataset)
    assert test.root.name == names[-1]
    assert len(test) == 10


def test_two_folders_of_one_split_are_told_apart_by_nobody(tmp_path: Path) -> None:
    pictures(tmp_path / "train" / "cat", tmp_path / "val" / "cat", tmp_path / "Valid" / "cat")
    with pytest.raises(ConfigError, match="'Valid' and 'val'"):
        folder.Config(name="folder", path=str(tmp_path)).open("train")


@pytest.mark.parametrize(("names", "told"), [(("train", "test", "extra_test"), "not used: extra_test"),
                                             (("val", "cat"), "val look like splits"),
                                             (("train2017", "val2017"), "train2017, val2017 look like splits")])  # fmt: skip
def test_what_looks_like_a_split_and_is_not_used_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: tuple[str, ...], told: str
) -> None:
    pictures(*(tmp_path / name / kind for name in names for kind in ("cat", "dog")))
    folder.Config(name="folder", path=str(tmp_path)).open("train")
    assert told in caplog.text


@pytest.mark.parametrize("head", ["path,Label,Split", "Path, label, split", "PATH,LABEL,SPLIT", "path,label,split"])
def test_a_tables_columns_are_found_whatever_their_capitals_and_blanks(tmp_path: Path, head: str) -> None:
    pictures(tmp_path, count=12)
    words = ("Training", " validation", "TEST", "train")
    rows = [f"{i}.png,{'abc'[i % 3]},{words[i % 4]}" for i in range(12)]
    (tmp_path / "t.csv").write_text("\n".join([head, *rows]) + "\n")
    config = table.Config(name="table", path=str(tmp_path / "t.csv"))
    opened = {split: config.open(split) for split in ("train", "val", "test")}
    assert files(opened["train"]) == {f"{i}.png" for i in range(12) if i % 4 in (0, 3)}
    assert files(opened["val"]) == {f"{i}.png" for i in range(12) if i % 4 == 1}
    assert files(opened["test"]) == {f"{i}.png" for i in range(12) if i % 4 == 2}
    assert opened["test"] is not None
    assert opened["test"].classes == ("a", "b", "c")


def test_a_column_that_may_be_of_splits_or_is_there_twice_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures(tmp_path, count=12)
    rows = "".join(f"{i}.png,{'ab'[i % 2]},{'ab'[i % 2]}\n" for i in range(12))
    (tmp_path / "t.csv").write_text("path,label,subset\n" + rows)
    table.Config(name="table", path=str(tmp_path / "t.csv")).open("train")
    assert "`data.split_column=subset`" in caplog.text
    (tmp_path / "two.csv").write_text("path,Label,LABEL\n" + rows)
    with pytest.raises(ConfigError, match=r"'Label' and 'LABEL'.*`data.label_column`"):
        table.Config(name="table", path=str(tmp_path / "two.csv")).open("train")


@pytest.mark.parametrize("form", ["{split}/{domain}/{kind}", "{domain}/{split}/{kind}"])
@pytest.mark.parametrize("names", [("train", "test"), ("Training", "valid")])
def test_domain_folders_have_splits_above_or_below_the_domains(
    tmp_path: Path, form: str, names: tuple[str, str]
) -> None:
    places = [(split, domain, kind) for split in names for domain in ("ink", "oil") for kind in ("cat", "dog")]
    pictures(*(tmp_path / form.format(split=split, domain=domain, kind=kind) for split, domain, kind in places))

    def opened(split: Any, **keys: Any) -> FileDataset:
        source = domain_folder.Config(name="domain_folder", path=str(tmp_path), **keys).open(split)
        assert isinstance(source, FileDataset)
        return source

    train, val, test = (opened(split) for split in ("train", "val", "test"))
    assert (train.domain_names, train.classes) == (("ink", "oil"), ("cat", "dog"))
    assert len(train) + len(val) == len(test) == 20
    assert all(names[0] in file for file in files(train) | files(val))
    assert all(names[1] in file for file in files(test))
    assert test.labels is not None
    assert test.domains is not None
    for file, domain, label in zip(test.files, test.domains.tolist(), test.labels.tolist(), strict=True):
        assert {("ink", "oil")[domain], ("cat", "dog")[label]} < set(file.split("/"))
    whole = opened("test", test_domains=("oil",))
    assert len(whole) == 20
    assert all("oil" in file for file in files(whole))
    if names[1] == "valid":  # it is no longer needed as the test
        assert files(opened("val", test_domains=("oil",))) == {file for file in files(test) if "ink" in file.split("/")}


@pytest.mark.parametrize("form", ["{split}/{kind}", "{kind}/{split}"])
def test_mask_folders_have_splits_above_or_below_images(tmp_path: Path, form: str) -> None:
    for split in ("Train", "val"):
        pictures(tmp_path / form.format(split=split, kind="images"), count=10)
        place = tmp_path / form.format(split=split, kind="masks")
        place.mkdir(parents=True)
        for i in range(10):
            Image.fromarray(np.full((5, 6), i % 2, np.uint8)).save(place / f"{i}.png")
    config = mask_folder.Config(name="mask_folder", path=str(tmp_path))
    opened = {split: config.open(split) for split in ("train", "val", "test")}
    assert [len(source or ()) for source in opened.values()] == [9, 1, 10]
    for split, source in opened.items():
        assert source is not None
        assert source.annotations is not None
        assert ("val" in source.describe(0)) == (split == "test")


def test_archives_of_another_split_are_not_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train-0", "Val-0", "test-0"):
        write_tar(tmp_path / f"{name}.tar", [(f"{i}.png", png(i)) for i in range(3)])
    stream = webdataset.Config(name="webdataset", path=str(tmp_path)).open_stream()
    assert stream.shards == ("train-0.tar",)
    assert "data.val=PATTERN" in caplog.text


@pytest.mark.parametrize(
    ("places", "told"),
    [(("",), "all images lie in"), (("", "cat", "dog"), "lie beside the folders"), (("cat",), "one folder 'cat'"),
     (("photos/cat", "photos/dog"), "/photos"), (("train/cat", "train/dog"), "/train")],
)  # fmt: skip
def test_missing_labels_have_one_reason_for_each_cause(tmp_path: Path, places: tuple[str, ...], told: str) -> None:
    pictures(*(tmp_path / place for place in places))
    source = folder.Config(name="folder", path=str(tmp_path)).open("train")
    assert source is not None
    assert source.labels is None
    (problem,) = check_labels("classification", source, None)
    assert told in problem
    assert ("give data.path=" in problem) == (len(places) == 2)


def test_a_table_without_labels_names_its_columns_and_one_class_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path, count=12)
    (tmp_path / "t.csv").write_text("path,kind\n" + "".join(f"{i}.png,a\n" for i in range(12)))

    def told(**keys: Any) -> str:
        source = table.Config(name="table", path=str(tmp_path / "t.csv"), **keys).open("train")
        assert source is not None
        return check_labels("classification", source, None)[0]

    assert "its columns are path, kind" in told()
    assert "at least two classes" in told(label_column="kind")
