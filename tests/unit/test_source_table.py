"""Tables of image files, and folders of domains: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.bad_files import warn_once
from ssl_pipeline.data.image_files import FileDataset
from ssl_pipeline.data.sources import domain_folder, table

ROWS = [
    {"path": f"images/{i}.png", "label": ("cat", "dog")[i % 2], "domain": ("ink", "photo", "oil")[i % 3]}
    for i in range(30)
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for row in ROWS:
        picture(tmp_path / row["path"])
    return tmp_path


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), "red").save(path)


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> None:
    lines = [delimiter.join(rows[0]), *(delimiter.join(str(v) for v in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "csv": write_csv,
    "tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}


def opened(path: Path, split: Any = "train", **keys: Any) -> FileDataset:
    source = table.Config(name="table", path=str(path), **keys).open(split)
    assert isinstance(source, FileDataset)
    return source


@pytest.mark.parametrize("kind", WRITERS)
def test_all_kinds_of_table_give_the_same_source(images: Path, kind: str) -> None:
    WRITERS[kind](images / f"t.{kind}", ROWS)
    write_csv(images / "other.csv", ROWS)
    for split in ("train", "val", "test"):
        source, expected = opened(images / f"t.{kind}", split), opened(images / "other.csv", split)
        assert source.files == expected.files
        assert source.fingerprint() == expected.fingerprint()
        assert source.classes == ("cat", "dog")
        assert source.domain_names == ("ink", "oil", "photo")
        assert source.labels is not None
        assert source.domains is not None
        for i, file in enumerate(source.files):
            row = next(row for row in ROWS if row["path"] == file)
            assert source.classes[source.labels[i]] == row["label"]
            assert source.domain_names[source.domains[i]] == row["domain"]
        assert source.open_image(0).size == (6, 5)
    parts = [set(opened(images / "other.csv", split).files) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [22, 2, 6]
    assert len(set.union(*parts)) == 30


def test_the_tables_own_splits_are_taken(images: Path) -> None:
    rows = [{**row, "split": ("Training", "val", "test")[min(2, i // 10)]} for i, row in enumerate(ROWS)]
    write_csv(images / "t.csv", rows)
    for split, start in (("train", 0), ("val", 10), ("test", 20)):
        assert opened(images / "t.csv", split).files == [row["path"] for row in rows[start : start + 10]]
    write_csv(images / "two.csv", rows[:20])
    assert len(opened(images / "two.csv", "test")) == 2  # held out of the 10 of `train`
    assert len(opened(images / "two.csv")) == 8


def test_domains_are_chosen_and_no_image_changes_its_split(images: Path) -> None:
    write_csv(images / "t.csv", ROWS)
    for split in ("train", "val", "test"):
        every = opened(images / "t.csv", split)
        assert every.domains is not None
        expected = [file for file, domain in zip(every.files, every.domains.tolist(), strict=True) if domain != 1]
        chosen = opened(images / "t.csv", split, domains=("photo", "ink"))
        assert list(chosen.files) == expected
        assert chosen.domain_names == ("ink", "oil", "photo")
        assert "oil" in chosen.absent_domains
    unlabeled = opened(images / "t.csv", domains=("oil",), label_column=None)
    assert [int(Path(file).stem) % 3 for file in unlabeled.files] == [2] * 10
    with pytest.raises(ConfigError, match=r"has no training row of 'pencil'. Its domains: ink, oil, photo"):
        opened(images / "t.csv", domains=("ink", "pencil"))
    with pytest.raises(ConfigError, match=r"has no column of domains: set `data.domain_column`"):
        opened(images / "t.csv", domains=("ink",), domain_column=None)


def test_whole_numbers_are_in_their_order_and_may_be_missing(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"path": row["path"], "label": None if i < 4 else float(i % 12)} for i, row in enumerate(ROWS)]
    write_parquet(images / "t.parquet", rows)
    with caplog.at_level(logging.WARNING):
        source = opened(images / "t.parquet", test=0.1, val=0.01)
    assert source.classes == tuple(str(i) for i in range(12))
    assert source.labels is not None
    assert source.labels[:4].tolist() == [-1] * 4
    assert "4 of 30 rows have no label" in caplog.text
    assert all(
        (part.labels is not None and (part.labels >= 0).all()) for part in [opened(images / "t.parquet", "test")]
    )


def test_without_labels_there_is_nothing_to_measure_on(images: Path) -> None:
    write_csv(images / "t.csv", ROWS)
    config = table.Config(name="table", path=str(images / "t.csv"), label_column=None)
    train = config.open("train")
    assert train is not None
    assert len(train) == 30
    assert config.open("val") is config.open("test") is None


def test_paths_may_be_absolute_or_start_from_a_root(images: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_csv(elsewhere / "a.csv", [{**row, "path": images / row["path"]} for row in ROWS])
    write_csv(elsewhere / "b.csv", [{**row, "path": row["path"].removeprefix("images/")} for row in ROWS])
    assert opened(elsewhere / "a.csv").open_image(0).size == (6, 5)
    assert opened(elsewhere / "b.csv", root=str(images / "images")).open_image(0).size == (6, 5)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("t.csv", "", "is empty"),
        ("t.csv", "path,label\n", "has no rows"),
        ("t.jsonl", "\n", "is empty"),
        ("t.parquet", "PAR1", "no whole Parquet file"),
        ("t.txt", "path\nx\n", "must end in .csv, .tsv, .jsonl, .parquet"),
        ("t.csv", "file,class\nx,y\n", "no column 'path'; it has 'file', 'class'"),
        ("t.csv", "path,label\nimages/0.png,a,b\n", "line 2: 3 values, and the first line names 2"),
        ("t.csv", 'path,label\n"images/0.png,a\n', "line 2"),
        ("t.jsonl", '{"path": "images/0.png"}\n{"path"\n', "line 2: no JSON"),
        ("t.jsonl", "[1]\n", "line 1: list"),
        ("t.csv", "path,split\nimages/0.png,train\nimages/1.png,holdout\nimages/2.png,\n", "'holdout' (1 rows), '' (1 rows)"),
        ("t.csv", "path,split\nimages/0.png,test\n", "nothing to train on"),
        ("t.csv", "path,split\nimages/0.png,train\nimages/0.png,test\n", "stands in `train` and in `test`"),
        ("t.csv", "path,split\nimages/0.png,train\n./images//0.png,test\n", "images/0.png stands in `train` and in `test`"),
        ("t.csv", "path,label,split\nimages/0.png,a,train\nimages/1.png,b,test\n", "no training row has: b. Nothing"),
        ("t.csv", "path,label,split\nimages/0.png,a,train\nimages/1.png,,test\n", "1 rows of `test` have no value"),
        ("t.csv", "path,label\nimages/0.png,\nimages/1.png,\n", "no row has a value in 'label'"),
        ("t.csv", "path,domain\nimages/0.png,\nimages/1.png,x\n", "1 rows have no value in 'domain'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(images: Path, name: str, text: str, told: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (images / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        opened(images / name)
    assert told in str(error.value)


def test_other_mistakes(images: Path) -> None:
    (images / "latin.csv").write_bytes("path\nimäges/0.png\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="not written in UTF-8"):
        opened(images / "latin.csv")
    with pytest.raises(ConfigError, match="no file"):
        opened(images / "nowhere.csv")
    write_csv(images / "t.csv", ROWS)
    with pytest.raises(ConfigError, match=r"no column 'kind'.*`data\.label_column`"):
        opened(images / "t.csv", label_column="kind")


def test_files_that_are_not_there_are_counted_and_named(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_csv(images / "t.csv", ROWS)
    for i in range(0, 24, 2):
        (images / f"images/{i}.png").unlink()
    with pytest.raises(ConfigError) as error:
        opened(images / "t.csv")
    assert len(error.value.problems) == 12
    assert "12 of the 30 files" in error.value.problems[-1]
    assert error.value.problems[0] == str(images / "images/0.png")
    with caplog.at_level(logging.WARNING):
        assert len(opened(images / "t.csv", on_missing="skip", test=0.1)) == 18 - 2 - 2
    assert "left out 12 rows of 30" in caplog.text


def test_parquet_without_pyarrow_names_the_extra(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (images / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"\.\[parquet\]"):
        opened(images / "t.parquet")


def labels_in(images: Path, kind: str, values: Sequence[Any]) -> list[str | None]:
    """Per image the class that a table's source gives it, in the order of the rows."""
    warn_once.cache_clear()
    path = images / f"labels.{kind}"
    WRITERS[kind](path, [{"path": f"images/{i}.png", "label": value} for i, value in enumerate(values)])
    table._read.cache_clear()
    classes = {}
    for source in table.Config(name="table", path=str(path)).open_every().values():
        assert source.labels is not None
        assert source.classes is not None
        for i, label in enumerate(source.labels.tolist()):
            classes[Path(source.describe(i)).stem] = source.classes[label] if label >= 0 else None
    return [classes[str(i)] for i in range(len(values))]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_what_says_that_there_is_no_label_is_the_same_in_every_table(
    images: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    nothing = ["nan", "NaN", "None", "N/A", "null", "", " ", "-1", "NA", "<NA>"]
    found = labels_in(images, kind, [*["cat", "dog"] * 5, *nothing])
    assert found == [*["cat", "dog"] * 5, *[None] * len(nothing)]
    assert "read as no label: 'nan' (1)" in caplog.text
    if kind != "csv":  # which has text alone
        values = [1, 2, 1, 2, None, -1] if kind == "parquet" else [1, 2.0, 1, "2", None, -1]
        assert labels_in(images, kind, values) == ["1", "2", "1", "2", None, None]


@pytest.mark.parametrize(
    ("values", "expected"),
    [(["cat ", " cat", "dog", "cat"], ["cat", "cat", "dog", "cat"]), (["1", "1.0", "2", "2."], ["1", "1", "2", "2"]),
     (["1", "1.0", "cat", "2"], ["1", "1.0", "cat", "2"]), (["1.5", "1.0", "1.5", "1.0"], ["1.5", "1.0", "1.5", "1.0"]),
     (["01", "1", "01", "1"], ["01", "1", "01", "1"])],
)  # fmt: skip
def test_blanks_and_decimal_points_make_no_classes(images: Path, values: list[str], expected: list[str]) -> None:
    assert labels_in(images, "csv", values) == expected


def test_several_labels_of_an_image_point_to_multi_label(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    for value in (["a", "b"], ["a"], {"a": 1}):
        with pytest.raises(
            ConfigError, match=r"row 2: 'label' holds .*`downstream=multi_label` with `data.target_columns"
        ):
            labels_in(images, "jsonl", ["a", value, "b"])
    assert not caplog.text
    assert labels_in(images, "csv", ["a|b", "a", "b", "a"]) == ["a|b", "a", "b", "a"]
    assert "'a|b' in 'label' is read as one class" in caplog.text


@pytest.fixture
def domains(tmp_path: Path) -> Path:
    for domain, classes in (("ink", "ab"), ("oil", "ab"), ("photo", "ac")):
        for name in classes:
            for i in range(10):
                picture(tmp_path / domain / name / f"{i}.png")
    (tmp_path / "readme.txt").write_text("not a domain")
    return tmp_path


def of_domains(path: Path, split: Any = "train", **keys: Any) -> FileDataset:
    source = domain_folder.Config(name="domain_folder", path=str(path), **keys).open(split)
    assert isinstance(source, FileDataset)
    return source


def test_domains_and_classes_are_numbered_over_the_whole_folder(domains: Path) -> None:
    source = of_domains(domains, domains=("oil", "photo"))
    assert source.domain_names == ("ink", "oil", "photo")
    assert source.classes == ("a", "b", "c")
    assert source.domains is not None
    assert source.labels is not None
    for file, domain, label in zip(source.files, source.domains, source.labels, strict=True):
        assert file.startswith(f"{source.domain_names[domain]}/{source.classes[label]}/")
    test = of_domains(domains, "test", domains=("oil", "photo"))
    assert test.domains is not None
    assert test.domains.bincount(minlength=3).tolist() == [0, 4, 4]  # 0.2 of each, evenly over the classes
    chosen = source.select(source.labels.argsort()[:3])
    assert chosen.domains is not None
    assert chosen.domain_names == source.domain_names


def test_a_domain_may_be_kept_for_the_test(domains: Path) -> None:
    keys = {"test_domains": ("ink",)}
    train, val, test = (of_domains(domains, split, **keys) for split in ("train", "val", "test"))
    assert [len(train), len(val), len(test)] == [36, 4, 20]
    assert all(file.startswith("ink/") for file in test.files)
    assert not any(file.startswith("ink/") for file in [*train.files, *val.files])


def test_what_is_no_folder_of_domains_is_told(domains: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"classes c .* in no training domain"):
        of_domains(domains, "test", test_domains=("photo",))
    with pytest.raises(ConfigError, match=r"no domain 'sketch'.*ink, oil, photo"):
        of_domains(domains, domains=("sketch",))
    with pytest.raises(ConfigError, match="ink would be trained on and tested on"):
        of_domains(domains, domains=("ink", "oil"), test_domains=("ink",))
    with pytest.raises(ConfigError, match="does not exist"):
        of_domains(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no image at domain/class/image"):
        of_domains(tmp_path / "empty")
