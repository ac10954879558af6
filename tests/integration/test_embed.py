"""Features in files, and the neighbors of an image."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ssl_pipeline.cli import VERBS
from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.decode import DecodeError
from ssl_pipeline.evaluation.load_encoder import describe_encoder
from ssl_pipeline.export import embed, neighbors
from ssl_pipeline.export.embed import EmbedConfig
from ssl_pipeline.export.neighbors import NeighborsConfig, find
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import Card, EncoderSpec, load_encoder, save
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.transforms.preprocessing import Preprocessing
from tests.pictures import color_folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_folder(tmp_path_factory.mktemp("images"), 10)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    blueprint = EncoderSpec(
        backbone=BackboneConfig(width=4), neck=NeckConfig(), channels=3, size=16, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    save(
        folder,
        blueprint.build()[0],
        Card(kind="encoder", blueprint=blueprint, config={}, data={}, figures={}, versions={}),
    )
    return folder


def source_of(images: Path) -> IndexedDataset:
    source = load("embed", EmbedConfig, ["data=folder", f"data.path={images}"]).data.open("train")
    assert isinstance(source, IndexedDataset)
    return source


def embed_to(run: Path, images: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    monkeypatch.setattr(sys, "argv", ["x", str(run), "data=folder", f"data.path={images}", f"output={output}", *more])
    embed.main()


def test_parquet_and_npz_hold_each_images_features_under_its_path(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("f.parquet", "f.npz"):
        embed_to(run, images, tmp_path / name, monkeypatch, "split=train")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.npz", "f.parquet"]
    source, (encoder, card) = source_of(images), load_encoder(run)
    table, arrays = pq.read_table(tmp_path / "f.parquet"), np.load(tmp_path / "f.npz")
    ids = table["id"].to_pylist()
    assert ids == arrays["id"].tolist() == [source.describe(i) for i in range(len(source))]
    assert table["label"].to_pylist() == [Path(path).parent.name for path in ids]
    assert arrays["classes"][arrays["label"]].tolist() == table["label"].to_pylist()
    rows = np.array(table["features"].to_pylist(), dtype=np.float32)
    assert np.array_equal(rows, arrays["features"])
    blueprint = card.blueprint
    preprocessing = Preprocessing(blueprint.size, blueprint.mean, blueprint.std)
    with torch.no_grad():
        alone = encoder.eval()(preprocessing.of_files([source.open_image(5)]))
    assert rows[5] == pytest.approx(alone[0].numpy(), abs=1e-5)
    about = json.loads(str(arrays["about"]))
    assert json.loads(about["classes"]) == ["blue", "green", "red"]
    assert table.schema.metadata[b"split"] == b'"train"'
    assert rows.shape == (len(source), encoder.width)


def test_every_image_is_embedded_unless_a_split_is_asked_for(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("f.parquet", "f.npz"):
        embed_to(run, images, tmp_path / name, monkeypatch)
    table, arrays = pq.read_table(tmp_path / "f.parquet"), np.load(tmp_path / "f.npz")
    ids, splits = table["id"].to_pylist(), table["split"].to_pylist()
    assert sorted(ids) == sorted(str(path) for path in images.rglob("*.png"))
    assert ids == arrays["id"].tolist()
    assert splits == arrays["split"].tolist()
    assert table["label"].to_pylist() == [Path(path).parent.name for path in ids]
    config = load(
        "embed", EmbedConfig, [*describe_encoder([str(run)], ["encoder"]), "data=folder", f"data.path={images}"]
    )
    test = config.data.open("test")
    assert test is not None
    assert [path for path, split in zip(ids, splits, strict=True) if split == "test"] == [
        test.describe(i) for i in range(len(test))
    ]


def test_no_features_stand_under_the_name_of_a_broken_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = color_folder(tmp_path / "images", 4)
    broken = images / "red" / "broken.png"
    broken.write_bytes((images / "red" / "0.png").read_bytes()[:-500])
    monkeypatch.setattr(
        sys, "argv", ["x", str(run), "data=folder", f"data.path={images / 'red'}", f"output={tmp_path / 'f.npz'}"]
    )
    with pytest.raises(SystemExit) as left:
        embed.main()
    assert left.value.code == 2
    assert f"{broken} can't be read as an image" in capsys.readouterr().err
    assert not (tmp_path / "f.npz").exists()


def test_the_neighbors_are_those_of_the_features(run: Path, images: Path) -> None:
    words = [*describe_encoder([str(run), "4"], ["encoder", "image"]), "data=folder", f"data.path={images}", "k=5"]
    config = load("neighbors", NeighborsConfig, words)
    source = source_of(images)
    _, found = find(config, source)
    features = embed.embed(load("embed", EmbedConfig, [words[0], *words[2:4], "split=train"])).features
    cosines = F.cosine_similarity(features[4:5], features)
    cosines[4] = -2
    assert [neighbor.index for neighbor in found] == cosines.topk(5).indices.tolist()
    assert [neighbor.similarity for neighbor in found] == pytest.approx(cosines.topk(5).values.tolist(), abs=1e-5)
    assert {neighbor.label for neighbor in found} == {Path(source.describe(4)).parent.name}


def test_a_file_finds_itself_and_the_picture_is_drawn(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = source_of(images).describe(7)
    words = [str(run), file, "data=folder", f"data.path={images}", "k=12", f"output={tmp_path / 'strip.png'}"]
    monkeypatch.setattr(sys, "argv", ["x", *words])
    neighbors.main()
    first = capsys.readouterr().out.splitlines()[0].split("  ")
    assert first[1] == file
    assert float(first[0]) == pytest.approx(1, abs=1e-4)
    with Image.open(tmp_path / "strip.png") as picture:
        assert picture.width == 1800  # ten tiles wide
        assert picture.height == pytest.approx(456)  # two rows


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["image=3", "k=500"], "`k` is 500, and there are only"),
        (["image=999"], "numbered from 0, and none has number 999"),
        ([], "`image` is required"),
    ],
)
def test_what_can_not_be_found_is_told(run: Path, images: Path, overrides: list[str], message: str) -> None:
    words = [*describe_encoder([str(run)], ["encoder"]), "data=folder", f"data.path={images}", *overrides]
    with pytest.raises(ConfigError, match=message):
        find(load("neighbors", NeighborsConfig, words), source_of(images))


def test_a_query_that_is_no_image_is_named(run: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    words = describe_encoder([str(run), str(tmp_path / "text.png")], ["encoder", "image"])
    with pytest.raises(DecodeError, match=r"text\.png can't be read as an image"):
        find(load("neighbors", NeighborsConfig, [*words, "data=folder", f"data.path={images}"]), source_of(images))


@pytest.mark.parametrize(
    ("output", "message"),
    [("f.parqet", r"ends in no format .* Did you mean \.parquet"), ("nowhere/f.npz", "there is no folder")],
)
def test_outputs_are_checked_before_the_work(output: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        embed.check_output(output)


def test_a_flat_folder_has_no_test_split(run: Path, images: Path) -> None:
    words = [*describe_encoder([str(run)], ["encoder"]), "data=folder", f"data.path={images / 'red'}", "split=test"]
    with pytest.raises(ConfigError, match="this data has no `test`"):
        embed.embed(load("embed", EmbedConfig, words))


def test_every_new_verb_is_listed() -> None:
    assert {"evaluate", "embed", "neighbors", "export", "predict"} <= set(VERBS)
