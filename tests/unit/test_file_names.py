"""Names whose bytes are no UTF-8, as old disks and archives have them, survive from the folder to what is written."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_pipeline.data.image_files import FileDataset
from ssl_pipeline.data.image_index import as_text
from ssl_pipeline.data.sources import domain_folder, folder
from ssl_pipeline.export.embed import Embeddings, write_npz, write_parquet
from ssl_pipeline.export.formatters import build_formatter
from ssl_pipeline.export.predict import _write
from ssl_pipeline.logging.progress import console

NAME = os.fsdecode(b"caf\xe9.png")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for kind in (b"c\xe9t", b"dog"):
        place = tmp_path / os.fsdecode(kind)
        place.mkdir()
        for i in range(4):
            data = io.BytesIO()
            Image.new("RGB", (8, 8)).save(data, "png")
            (place / f"{i}{NAME}").write_bytes(data.getvalue())
    return tmp_path


def standard_output(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    """As it is under a UTF-8 locale."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "utf-8", errors="strict", write_through=True))
    return written


def test_class_names_are_text_and_files_are_found(images: Path) -> None:
    source = folder.Config(name="folder", path=str(images)).open("train")
    assert source is not None
    assert source.classes == ("c\\udce9t", "dog")
    assert source.open_image(0).size == (8, 8)
    json.dumps(source.classes).encode()
    above = domain_folder.Config(name="domain_folder", path=str(images.parent / images.name))
    (images / "ink").mkdir()
    for kind in (b"c\xe9t", b"dog"):
        (images / os.fsdecode(kind)).rename(images / "ink" / os.fsdecode(kind))
    opened = above.open("train")
    assert opened is not None
    assert opened.classes == ("c\\udce9t", "dog")


@pytest.mark.parametrize("form", ["text", "csv", "jsonl"])
def test_predictions_name_the_very_file(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    out = standard_output(monkeypatch)
    rows = [{"file": name, "classes": ["dog"], "probabilities": [1.0]} for name in (NAME, "ä.png")]
    assert _write(iter(rows), form, build_formatter("classes", ("cat", "dog")), None) == 0
    lines = out.getvalue().splitlines()
    if form == "jsonl":
        assert [json.loads(line)["file"] for line in lines] == [NAME, "ä.png"]
        assert "ä.png".encode() in lines[1]
    elif form == "csv":
        text = os.fsdecode(out.getvalue())
        assert [row[0] for row in csv.reader(text.splitlines())] == ["file", NAME, "ä.png"]
    else:
        assert lines[0].startswith(b"caf\xe9.png ")


def test_features_stand_under_names_that_any_reader_takes(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    source = FileDataset("few", tmp_path, [NAME, "ä.png"], 3, torch.tensor([0, 1]), (NAME, "b"))
    embedded = Embeddings(torch.zeros(2, 3), {"train": source}, {"data": "1"})
    write_parquet(embedded, tmp_path / "f.parquet")
    table = parquet.read_table(tmp_path / "f.parquet")
    assert [Path(name).name for name in table["id"].to_pylist()] == ["caf\\udce9.png", "ä.png"]
    assert table["label"].to_pylist() == ["caf\\udce9.png", "b"]
    write_npz(embedded, tmp_path / "f.npz")
    assert [os.path.basename(name) for name in np.load(tmp_path / "f.npz")["id"]] == [NAME, "ä.png"]  # noqa: PTH119


def test_what_is_printed_escapes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    out = standard_output(monkeypatch)
    console().print(f"finetune: {NAME}", markup=False)
    assert b"caf\\udce9.png" in out.getvalue()
    assert as_text("日本 ä") == "日本 ä"
