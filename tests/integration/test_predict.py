"""``predict`` for what is no class of an image: numbers, labels, masks and boxes, in the image's own pixels."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.options import FORMATS
from ssl_pipeline.config.schema import component
from ssl_pipeline.downstream.load_model import load_model
from ssl_pipeline.downstream.task import DownstreamConfig
from ssl_pipeline.export.export import export
from ssl_pipeline.export.formatters import Boxes, CocoIds, Mask, build_formatter, coco_results, palette
from ssl_pipeline.export.parts import open_parts
from ssl_pipeline.export.predict import main, open_predictor, predict
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import Card, EncoderSpec, save
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.transforms.preprocessing import Preprocessing

SMALL: dict[str, dict[str, Any]] = {
    "regression": {}, "multi_label": {}, "segmentation": {},
    "detection": {"width": 16, "hidden": 16, "rpn_post_nms_top_n": 20, "score_threshold": 0.0},
}  # fmt: skip


def stage_two(folder: Path, name: str) -> Path:
    """A run's folder with a model that was not trained."""
    tree = {"name": name, **SMALL[name]}
    config = component("downstream", "downstream", tree)
    assert isinstance(config, DownstreamConfig)
    blueprint = EncoderSpec(
        backbone=BackboneConfig(width=4), neck=NeckConfig(), channels=3, size=32, mean=(0.4,) * 3, std=(0.3,) * 3
    )
    torch.manual_seed(0)
    task = config.build(blueprint.build()[0], 3)
    folder.mkdir(parents=True, exist_ok=True)
    save(folder, task, Card(
        kind="model", blueprint=blueprint, config={"downstream": tree}, data={}, figures={}, versions={}, classes=("sky", "sea", "käse"),
    ))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (40, 60, 3)), ("b.png", (50, 30, 3)), ("more/a.png", (20, 20, 3))):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8)).save(folder / name)
    (folder / "torn.png").write_bytes((folder / "a.png").read_bytes()[:80])
    return folder


class Planted:
    """Sees bright pixels at 20 × 20, as a mask of two classes or as one box in shares of the image."""

    classes = ("dark", "bright")
    channels = 3
    value_range = None

    def __init__(self, gives: str) -> None:
        self.gives = gives

    def predict(self, images: list[Image.Image]) -> Any:
        bright = Preprocessing(20, (0.5,) * 3, (1.0,) * 3, whole=True).of_files(images).mean(1)
        if self.gives == "mask":
            return torch.stack([-bright, bright], 1)
        found = []
        for one in bright:
            rows, columns = (one > 0).nonzero(as_tuple=True)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            box = torch.stack([edge.float() for edge in edges]) / 20
            found.append({"boxes": box[None], "labels": torch.tensor([1]), "scores": torch.tensor([0.9])})
        return found


@pytest.mark.parametrize("turned", [False, True])
def test_a_planted_shape_is_told_in_the_image_s_own_pixels(turned: bool, tmp_path: Path) -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[10:30, 8:48] = 255
    image, exif = Image.fromarray(pixels), Image.Exif()
    if turned:  # as a camera writes what was taken upright
        exif[0x0112] = 6
        pixels = np.rot90(pixels, -1)
    image.save(tmp_path / "x.png", exif=exif)
    (row,) = predict(Planted("boxes"), [tmp_path / "x.png"])
    rows, columns = pixels[:, :, 0].nonzero()
    expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert row["objects"] == [{"class": "bright", "score": 0.9, "box": [float(edge) for edge in expected]}]
    assert (row["height"], row["width"]) == pixels.shape[:2]
    answers = Mask(Planted.classes, tmp_path / "masks")
    (row,) = predict(Planted("mask"), [tmp_path / "x.png"], answers)
    with Image.open(row["mask"]) as mask:
        assert mask.mode == "P"
        wrong = (np.asarray(mask) > 0) != (pixels[:, :, 0] > 0)
    corners = {(y, x) for y in (rows.min(), rows.max()) for x in (columns.min(), columns.max())}
    assert set(zip(*wrong.nonzero(), strict=True)) <= corners  # which bilinear enlarging rounds off
    assert row["shares"]["bright"] == pytest.approx(0.25, abs=0.002)


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", list(SMALL))
def test_each_task_is_predicted_from_its_folder(
    name: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stage_two(tmp_path / name, name)
    own = {"segmentation": ["--masks", str(tmp_path / "masks")], "detection": ["--threshold", "0.2"]}.get(name, [])
    with pytest.raises(SystemExit) as left:
        main([str(run), str(photos), "--format", "jsonl", *own])
    rows = rows_of(capsys.readouterr().out)
    assert left.value.code == 2
    assert [Path(row["file"]).name for row in rows if "error" in row] == ["torn.png"]
    whole = [row for row in rows if "error" not in row]
    model = load_model(run)
    for row in whole:
        with Image.open(row["file"]) as file:
            prediction = model.predict([file.convert("RGB")])[0]
        if name == "regression":
            assert list(row["values"].values()) == pytest.approx(prediction.tolist(), rel=1e-4)
        elif name == "multi_label":
            assert list(row["probabilities"].values()) == pytest.approx(prediction.sigmoid().tolist(), abs=1e-3)
            assert row["labels"] == [n for n, p in row["probabilities"].items() if p >= 0.5]
        elif name == "segmentation":
            assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-4)
            with Image.open(row["mask"]) as mask:
                assert mask.size == file.size
        else:
            kept = prediction["scores"] >= 0.2
            assert [one["score"] for one in row["objects"]] == pytest.approx(
                prediction["scores"][kept].tolist(), abs=1e-3
            )
    if name == "segmentation":
        assert len({row["mask"] for row in whole}) == 3  # two images have one name
    with pytest.raises(SystemExit):
        main([str(run), str(photos), "--format", "csv", *own])
    header, *lines = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header[0] == "file"
    assert header[-1] == "error"
    assert all(len(line) == len(header) for line in lines)


@pytest.mark.parametrize(
    ("name", "form", "inside"),
    [("regression", "torch.export", False), ("multi_label", "onnx", False), ("segmentation", "onnx", True), ("segmentation", "torch.export", False)],
)  # fmt: skip
def test_a_graph_says_the_same(name: str, form: str, inside: bool, photos: Path, tmp_path: Path) -> None:
    run = stage_two(tmp_path / name, name)
    path = tmp_path / FORMATS[form][1]
    export(open_parts(run), form, path, inside)
    ours, theirs = load_model(run), open_predictor(path)
    assert (theirs.gives, theirs.classes, theirs.channels) == (ours.gives, ours.classes, ours.channels)
    image = Image.open(photos / "a.png")
    expected, found = ours.predict([image]), theirs.predict([image])
    assert isinstance(found, Tensor)
    # Pillow and torch's kernel for bytes round the resized image to whole bytes, the graph does not.
    torch.testing.assert_close(found, expected, atol=0.05 if inside else 1e-4, rtol=1e-4)


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    boxes, values = (open_parts(stage_two(tmp_path / name, name)) for name in ("detection", "regression"))
    for form in ("onnx", "torch.export"):
        with pytest.raises(ConfigError, match="depends on the image"):
            export(boxes, form, tmp_path / FORMATS[form][1])
    with pytest.raises(ConfigError, match="the library's own networks classify"):
        export(values, "torchvision", tmp_path / "x.safetensors")
    export(boxes, "safetensors", tmp_path / "again")
    assert load_model(tmp_path / "again").card.classes == ("sky", "sea", "käse")


def test_boxes_as_coco_has_them(tmp_path: Path) -> None:
    known = {"images": [{"id": 7, "file_name": "x.png"}], "categories": [{"id": 30, "name": "käse"}]}
    (tmp_path / "known.json").write_text(json.dumps(known))
    row = {"file": "there/x.png", "objects": [{"class": "käse", "score": 0.5, "box": [1.0, 2.0, 4.0, 8.0]}]}
    wanted = [{"image_id": 7, "category_id": 30, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.5}]
    assert coco_results([row, {"file": "torn.png", "error": "torn"}], CocoIds(tmp_path / "known.json")) == wanted
    for changed in ({"file": "y.png"}, {"objects": [{**row["objects"][0], "class": "sea"}]}):  # type: ignore[dict-item]
        with pytest.raises(ConfigError, match="has no"):
            coco_results([{**row, **changed}], CocoIds(tmp_path / "known.json"))


def test_images_of_one_name_have_the_numbers_of_their_folders(tmp_path: Path) -> None:
    known = {
        "images": [{"id": 1, "file_name": "train/1.png"}, {"id": 2, "file_name": "val/1.png"}],
        "categories": [{"id": 30, "name": "sea"}],
    }
    (tmp_path / "known.json").write_text(json.dumps(known))
    one = {"class": "sea", "score": 0.5, "box": [1.0, 2.0, 4.0, 8.0]}
    found = [{"file": f"photos/{folder}/1.png", "objects": [one]} for folder in ("val", "train")]
    assert [row["image_id"] for row in coco_results(found, CocoIds(tmp_path / "known.json"))] == [2, 1]
    with pytest.raises(ConfigError, match=r"has 2 images that '1\.png' may be"):
        coco_results([{"file": "1.png", "objects": [one]}], CocoIds(tmp_path / "known.json"))


def test_a_mask_overwrites_nothing(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "white").save(tmp_path / "x.png")
    before = (tmp_path / "x.png").read_bytes()
    (row,) = predict(Planted("mask"), [tmp_path / "x.png"], Mask(Planted.classes, tmp_path))
    assert (tmp_path / "x.png").read_bytes() == before
    assert row["mask"] == str(tmp_path / "x-2.png")


def test_options_that_do_not_go_together_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for gives, options, sentence in (
        ("classes", {"masks": tmp_path}, "--masks is for models of masks"),
        ("mask", {"threshold": 0.5}, "--threshold is for labels and boxes"),
        ("boxes", {"threshold": 2.0}, "lie between 0 and 1"),
        ("other", {}, "from Python"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            build_formatter(gives, ("a",), **options)
    with pytest.raises(SystemExit):
        main(
            [str(stage_two(tmp_path / "x", "regression")), str(tmp_path), "--format", "coco", "--annotations", "x.json"]
        )
    assert "--format coco is for boxes" in capsys.readouterr().err
    assert Boxes(("a",), 0.5).text({"objects": []}) == "nothing"
    assert palette(3) == [0, 0, 0, 128, 0, 0, 0, 128, 0]
