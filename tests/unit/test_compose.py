"""A YAML file of the user's own that can't be read is told by its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.compose import compose


@pytest.mark.parametrize(
    ("text", "where", "why"),
    [
        ("name: simclr\ntemperature: {value: 0.1\nlayers: 2\n", ", line 3, column 7", "expected ',' or '}'"),
        ("name: simclr\n\tlayers: 2\n", ", line 2, column 1", "cannot start any token"),
        ("name: simclr\nname: dcl\n", ", line 2, column 1", "duplicate key name"),
        ("name: sim\x01clr\n", "", "no text in UTF-8"),
        (b"name: \xff\n", "", "no text in UTF-8"),
    ],
)
def test_a_broken_file_of_the_users_own(tmp_path: Path, text: str | bytes, where: str, why: str) -> None:
    (tmp_path / "pretext").mkdir()
    (tmp_path / "pretext" / "whole.yaml").write_text("name: simclr  # naïve τ\n", encoding="utf-8")
    file = tmp_path / "pretext" / "mine.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert compose("pretrain", ["pretext=whole"], tmp_path)["pretext"] == {"name": "simclr"}
    with pytest.raises(ConfigError) as caught:
        compose("pretrain", ["pretext=mine"], tmp_path)
    assert str(caught.value).startswith(f"{file}{where}: this is no ")
    assert why in str(caught.value)
    assert "whole" not in str(caught.value)
