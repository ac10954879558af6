"""A file is written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ssl_pipeline.config.files import atomic_write, atomic_write_text


def test_the_new_content_takes_the_place_of_the_old(tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    for text in ("old", "new ü"):
        atomic_write_text(file, text)
        assert file.read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]


def test_an_error_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(file) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        assert file.read_text() == "old"
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]


def test_the_content_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, flushed = tmp_path / "card.json", []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        flushed.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), file.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    atomic_write_text(file, "text")
    assert flushed == [(str(tmp_path / ".card.json.partial"), False), (str(tmp_path), True)]
