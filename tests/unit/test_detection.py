"""Detection, and the boxes it learns from, on images whose right answer is known."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.data.bad_files import parse_limit
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.build import AnnotatedLoader
from ssl_pipeline.data.dataset import ArrayDataset, annotations_of
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.data.sources import coco
from ssl_pipeline.data.targets import Boxes
from ssl_pipeline.downstream.detection import Config
from ssl_pipeline.downstream.load_model import load_model
from ssl_pipeline.evaluation.result import Result
from ssl_pipeline.finetune import finetune
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.models.batch_norm import batch_norms
from ssl_pipeline.models.encoder import load_encoder
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.pretrain_config import PretrainConfig
from ssl_pipeline.schedules import TrainProgress
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.multi_view import Views
from tests.runs import same_bytes
from tests.shapes import box_folder, scene
from tests.unit.test_downstream_vector import encoder

CPU = DistInfo(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return box_folder(tmp_path_factory.mktemp("boxes") / "all", 60, height=48, width=48)


@pytest.fixture(scope="module")
def stage_one(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [
        "tracking=off", "num_workers=0", "data=coco", f"data.path={folder / 'annotations.json'}", "transform=small", "backbone.width=8",
        "backbone.stem=imagenet", "batch_size=32", "steps=15", "pretext.hidden_width=16", "pretext.projection_width=16",
        "evaluate_every=0 steps",
    ]  # fmt: skip
    return pretrain(load("pretrain", PretrainConfig, [*words, f"output={tmp_path_factory.mktemp('one') / 'run'}"]))


def run(folder: Path, output: Path, *overrides: str) -> Result:
    words = [
        "tracking=off",
        "num_workers=0",
        "data=coco",
        f"data.path={folder / 'annotations.json'}",
        "downstream=detection",
    ]
    small = [
        f"downstream.{key}"
        for key in ("width=16", "hidden=32", "rpn_post_nms_top_n=100", "box_batch_size_per_image=32")
    ]
    short = ["size=48", "regime.min_steps=0", "regime.batch_size=8"]
    return finetune(load("finetune", FinetuneConfig, [*words, *small, *short, f"output={output}", *overrides]))


def test_squares_and_circles_are_found(folder: Path, stage_one: Path, tmp_path: Path) -> None:
    length = ["regime.length=100 steps", "regime.optim.lr=0.01", "regime.backbone_lr_factor=1", "labels.validation=0"]
    result = run(folder, tmp_path / "run", "regime=end_to_end", f"encoder={stage_one}", *length)
    assert next(iter(result.figures[0])) == "map"
    assert result.interval("map_50").mean > 0.6
    model = load_model(result.folder)
    assert model.card.classes == ("square", "circle")
    wanted = scene(500, 48, 48)
    (found,) = model.predict([Image.fromarray(wanted.image).resize((480, 480))])
    best = found["boxes"][0] * 48
    assert any((best - torch.tensor([x, y, x + w, y + h])).abs().max() < 5 for x, y, w, h in wanted.boxes)
    assert found["boxes"].max() <= 1
    assert (found["scores"].diff() <= 0).all()


def test_the_one_stage_head_finds_them_too(folder: Path, stage_one: Path, tmp_path: Path) -> None:
    length = ["regime.length=140 steps", "regime.optim.lr=0.005", "regime.backbone_lr_factor=1", "labels.validation=0"]
    own = ["regime=end_to_end", f"encoder={stage_one}", "downstream.head=retinanet"]
    own += ["downstream.batch_norm=trained"]  # fifteen steps of pretraining leave no statistics worth keeping
    result = run(folder, tmp_path / "run", *own, *length)
    assert result.interval("map_50").mean > 0.5
    (found,) = load_model(result.folder).predict([Image.fromarray(scene(500, 48, 48).image)])
    assert found["boxes"].max() <= 1
    assert (found["scores"].diff() <= 0).all()


SHORT = ["regime.length=2 steps", "regime.probe.length=2 steps", "regime.probe.min_steps=0"]


@pytest.mark.parametrize("regime", ["frozen", "lp_ft", "scratch"])
def test_every_regime_holds(folder: Path, stage_one: Path, tmp_path: Path, regime: str) -> None:
    result = run(folder, tmp_path / "run", f"regime={regime}", f"encoder={stage_one}", *SHORT)
    assert 0 <= result.interval("map").mean <= 1
    before = load_encoder(stage_one)[0].state_dict()
    after = load_model(result.folder).task.encoder.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items()) == (regime == "frozen")


def test_boxes_follow_their_images_through_the_views() -> None:
    """An image is black but for its box: each view of it shows where its target must be."""
    pixels, boxes = torch.zeros(12, 3, 40, 50, dtype=torch.uint8), []
    for i in range(12):
        left, top, right, bottom = 2 * i + 3, i + 8, 2 * i + 3 + 14, i + 8 + 12
        pixels[i, :, top:bottom, left:right] = 255
        boxes.append(torch.tensor([[left, top, right, bottom]], dtype=torch.float32))
    sizes = torch.tensor([[40, 50]]).expand(12, -1)
    annotations = Boxes(boxes, [torch.zeros(1, dtype=torch.int64)] * 12, sizes, ("box",))
    source = ArrayDataset("x", pixels).with_annotations(annotations)
    config = load("finetune", FinetuneConfig, ["transform.crop.scale=[0.2,0.8]", "transform.size=40"]).transform
    views = Views(config.for_channels(3)[0], (0.0,) * 3, (1.0,) * 3, 3)
    kept = dropped = 0
    for batch in AnnotatedLoader(source, views, 4, 3, CPU, 12, workers=0, with_labels=True).from_step(0):
        for view, target in zip(batch.views[0], batch.target, strict=True):
            rows, columns = (view[0] > 0.5).nonzero(as_tuple=True)
            if len(target["boxes"]) == 0:
                dropped += 1
                continue
            shown = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (target["boxes"][0] - shown).abs().max() <= 1
            kept += 1
    assert kept > 20
    assert dropped > 0


def test_permuting_test_boxes_changes_no_weight_and_runs_reproduce(
    folder: Path, stage_one: Path, tmp_path: Path
) -> None:
    record = json.loads((folder / "annotations.json").read_text())
    held = {image["id"] for image in record["images"][::4]}

    def written(name: str, shift: int) -> Path:
        root = tmp_path / f"data_{name}"
        root.mkdir()
        for part, measured in (("annotations", False), ("test", True)):
            images = [one for one in record["images"] if (one["id"] in held) == measured]
            own = [one for one in record["annotations"] if (one["image_id"] in held) == measured]
            moved = [{**one, "category_id": 30 - one["category_id"]} if shift and measured else one for one in own]
            whole = {"images": images, "annotations": moved, "categories": record["categories"]}
            (root / f"{part}.json").write_text(json.dumps(whole))
        more = [f"data.test_path={root / 'test.json'}", f"data.images={folder / 'images'}", "labels.validation=0.3"]
        return run(root, tmp_path / name, "regime=end_to_end", f"encoder={stage_one}", *SHORT, *more).folder

    first, again, other = written("a", 0), written("b", 0), written("c", 1)
    assert same_bytes(first, again, ["model.safetensors", "results.json"])
    assert same_bytes(first, other, ["model.safetensors"])


def change(root: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    path = box_folder(root, 6) / "annotations.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
    return path


def test_what_is_wrong_with_boxes_is_told(tmp_path: Path) -> None:
    def first(key: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
        return lambda record: record[key][0].update(changes)

    wrong = {
        "outside": (
            first("annotations", bbox=[40, 3, 5, 5]),
            r"annotation 0 on image 100: .* lies outside of its image of 32×32",
        ),
        "flat": (first("annotations", bbox=[4, 3, 0, 5]), "has no area"),
        "corners": (first("annotations", bbox=[4, 3]), "four numbers were expected"),
        "category": (first("annotations", category_id=7), "no category has that id"),
        "image": (first("annotations", image_id=7), "no image has that id"),
        "size": (first("images", width=64), r"declared with 64×32 pixels, and the file has 32×32"),
        "file": (first("images", file_name="x.png"), r"x\.png is not there"),
        "twice": (first("images", id=101), "more than one entry of `images` has the id 101"),
        "same file": (
            lambda record: record["images"][1].update(file_name=record["images"][0]["file_name"]),
            "more than one entry of `images` has the file_name",
        ),
        "null image": (first("images", id=None), "has the id None"),
        "text size": (first("images", width="32"), "has the width '32', and a whole number"),
        "text id": (first("categories", id="a"), "ids of `categories` must be whole numbers, and '.*' has the id 'a'"),
        "null id": (first("categories", id=None), "has the id None: number them"),
        "same id": (
            lambda record: record["categories"][0].update(id=record["categories"][1]["id"]),
            "have the id '20'",
        ),
        "same name": (
            lambda record: record["categories"][0].update(name=record["categories"][1]["name"]),
            "two entries of `categories` have the name",
        ),
        "list id": (first("annotations", image_id=[1]), r"annotation 0 has the image_id \[1\]"),
        "crowd": (first("annotations", iscrowd="maybe"), "annotation 0 has `iscrowd` 'maybe'"),
        "too many": (
            first("annotations", bbox=[4, 3, 5, 0]),
            "1 of .* annotations .* `data.max_bad_files=1%` allows 0",
        ),
        "keys": (lambda record: record["annotations"][0].pop("bbox"), "entry 0 of `annotations` has no 'bbox'"),
        "list": (lambda record: record.pop("categories"), "has no list `categories`"),
    }
    for name, (edit, sentence) in wrong.items():
        path = change(tmp_path / name, edit)
        with pytest.raises(ConfigError, match=sentence):
            coco.Config(name="coco", path=str(path)).open("train")
    (tmp_path / "half.json").write_text("{")
    for path, sentence in (
        (tmp_path / "half.json", "no whole JSON file"),
        (tmp_path / "none.json", "there is no file"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            coco.Config(name="coco", path=str(path)).open("train")


def official(truths: list[dict[str, Tensor]], found: list[dict[str, Tensor]]) -> dict[str, float]:
    """pycocotools' own figures."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def sides(box: Tensor) -> list[float]:
        return [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]

    annotations = [
        {"image_id": image, "category_id": int(label), "bbox": sides(box), "area": float((box[2:] - box[:2]).prod()), "iscrowd": int(crowd)}
        for image, one in enumerate(truths)
        for box, label, crowd in zip(one["boxes"], one["labels"], one["iscrowd"], strict=True)
    ]  # fmt: skip
    results = [
        {"image_id": image, "category_id": int(label), "bbox": sides(box), "score": float(score)}
        for image, one in enumerate(found)
        for box, label, score in zip(one["boxes"], one["labels"], one["scores"], strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        images = [{"id": image, "height": 64, "width": 64} for image in range(len(truths))]
        numbered = [{**one, "id": place + 1} for place, one in enumerate(annotations)]
        truth.dataset = {"images": images, "annotations": numbered, "categories": [{"id": c} for c in range(3)]}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    places = {"map": 0, "map_50": 1, "map_75": 2, "recall_100": 8}
    return {name: float(evaluation.stats[place]) for name, place in places.items()}


def random_boxes(count: int, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    corners = 64 * torch.rand(count, 2, 2, generator=generator).sort(dim=1).values
    boxes = torch.cat([corners[:, 0], corners[:, 1] + 4], 1).clamp(0, 64)
    return boxes, torch.randint(0, classes, (count,), generator=generator)


def test_figures_are_cocos_own_with_crowds_and_an_absent_class() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [random_boxes(3, 2, generator) for _ in range(12)]  # class 2 has no box
    crowds = [random_boxes(image % 2, 2, generator) for image in range(12)]
    sizes = torch.full((12, 2), 64)
    annotations = Boxes(
        [boxes for boxes, _ in parts], [labels for _, labels in parts], sizes, ("a", "b", "c"), crowds
    ).select(torch.arange(12).flip(0))
    truths, found = [annotations.whole(image) for image in range(12)], []
    for truth in truths:
        more, classes = random_boxes(6, 3, generator)
        near = truth["boxes"] + 3 * torch.rand(len(truth["boxes"]), 1, generator=generator)
        boxes = torch.cat([near, more]).clamp(0, 64)
        labels = torch.cat([truth["labels"], classes])
        found.append({"boxes": boxes, "labels": labels, "scores": torch.rand(len(boxes), generator=generator)})
    task = Config(name="detection", width=8, hidden=8, rpn_post_nms_top_n=20, box_batch_size_per_image=8).build(
        encoder(size=32), 3
    )
    shares = [{**one, "boxes": one["boxes"] / 64} for one in found]
    figures = task.score([task.compare(one, truth) for one, truth in zip(shares, truths, strict=True)])
    assert figures == pytest.approx(official(truths, found), abs=1e-6)
    assert figures["map"] > 0.1
    without = [{key: truth[key][truth["iscrowd"] == 0] for key in ("boxes", "labels", "iscrowd")} for truth in truths]
    assert official(without, found)["map"] < figures["map"] - 0.01
    nothing = {key: rows[:0] if key != "size" else rows for key, rows in truths[0].items()}
    assert task.score([task.compare(shares[0], nothing)]) == {}


def test_annotations_that_can_not_be_used_are_left_out_within_the_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def edit(record: dict[str, Any]) -> None:
        record["annotations"] = [
            {"id": 0, "image_id": 100, "category_id": 10, "bbox": [29.65, 38.33, 1.03, 0.0]},
            {"id": 1, "image_id": 100, "category_id": 20, "bbox": [0, 0, 9, 9], "iscrowd": "0"},
            {"id": 2, "image_id": 101, "category_id": 20, "bbox": [0, 0, 9, 9], "iscrowd": "1"},
        ]

    path = change(tmp_path / "flat", edit)
    with caplog.at_level(logging.WARNING):
        source = coco.Config(name="coco", path=str(path), max_bad_files="40%").open_pool()
    assert "left out 1 of 3 annotations, such as:" in caplog.text
    assert "annotation 0 on image 100: the box [29.65, 38.33, 1.03, 0.0] has no area" in caplog.text
    every = coco._read(path, path.parent / "images", None, 3, parse_limit("40%"))[1]
    boxes = annotations_of(every, Boxes)
    assert boxes is not None
    assert [len(one) for one in boxes.boxes][:2] == [1, 0]  # the text "0" is no crowd, and "1" is one
    assert source is not None
    assert source.bad_files is not None
    assert str(source.bad_files.limit) == "40%"


def test_boxes_at_the_edge_are_cut_off_and_nothing_is_learned_from_crowds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def edit(record: dict[str, Any]) -> None:
        record["annotations"] = [
            {"id": 0, "image_id": 100, "category_id": 10, "bbox": [-4, 20, 10, 30.5]},
            {"id": 1, "image_id": 100, "category_id": 20, "bbox": [0, 0, 9, 9], "iscrowd": 1},
            {"id": 2, "image_id": 101, "category_id": 20, "bbox": [0, 0, 9, 9]},
        ]

    path = change(tmp_path / "edge", edit)
    with caplog.at_level(logging.WARNING):
        _, source = coco._read(path, path.parent / "images", None, 3, parse_limit("1%"))
    boxes = annotations_of(source, Boxes)
    assert boxes is not None
    assert boxes.boxes[0].tolist() == [[0, 20, 6, 32]]
    assert boxes.counts().tolist() == [1, 1]
    assert [len(one) for one in boxes.boxes] == [1, 1, 0, 0, 0, 0]
    assert "1 of 3 boxes reach out" in caplog.text
    assert "1 regions marked iscrowd" in caplog.text
    assert boxes.whole(0)["iscrowd"].tolist() == [0, 1]
    assert boxes.whole(0)["boxes"].tolist() == [[0, 20, 6, 32], [0, 0, 9, 9]]
    assert len(boxes.select(torch.tensor([1, 0])).crowds[1][0]) == 1
    keys = {"size": 32, "horizontal_flip": 0.0, "crop": {"scale": [1, 1], "ratio": [1, 1]}}
    policy, _ = ViewsConfig.model_validate(keys).for_channels(3)
    (seen,) = boxes.of_views(torch.tensor([0]), Views(policy, (0.5,) * 3, (0.5,) * 3, 0), 0)
    assert len(seen["boxes"]) == 1


def test_what_detection_lacks_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(name="detection")
    none = ArrayDataset("x", torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert "take data=coco" in config.check(none)[0]
    source = coco.Config(name="coco", path=str(folder / "annotations.json")).open("train")
    assert source is not None
    boxes = annotations_of(source, Boxes)
    assert boxes is not None
    squares = torch.tensor([i for i, labels in enumerate(boxes.labels) if 1 not in labels])
    assert "that no training image has: 'circle'" in config.check(source.select(squares), source)[0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install -e ".[detection]"' in config.check(source)[0]


@pytest.mark.parametrize(("batch_norm", "pretrained", "moves"), [
    ("frozen", True, False), ("trained", True, True), ("frozen", False, True),
])  # fmt: skip
def test_batch_norms_of_a_pretrained_encoder_stay_as_they_are_by_default(
    batch_norm: str, pretrained: bool, moves: bool
) -> None:
    network = encoder(size=32)
    if pretrained:
        for norm in batch_norms(network):
            assert norm.running_var is not None
            norm.running_var.fill_(2.0)
    keys = {
        "name": "detection",
        "width": 8,
        "hidden": 8,
        "rpn_post_nms_top_n": 20,
        "box_batch_size_per_image": 8,
        "batch_norm": batch_norm,
    }
    task = Config.model_validate(keys).build(network, 2)
    task.fix_encoder(True)  # as LP-FT does
    task.fix_encoder(False)
    task.train()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    truth = {"boxes": torch.tensor([[2.0, 2, 20, 20]]), "labels": torch.tensor([1])}
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    task(Batch(TrainProgress(0, 1, 1), torch.arange(2), [images], target=[truth, truth])).loss.backward()
    optimizer.step()
    changed = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    of_norms = {f"encoder.{name}.{own}" for name, norm in network.named_modules() if norm in batch_norms(network)
                for own in norm.state_dict()}  # fmt: skip
    assert bool(of_norms & changed) == moves
    assert any(name.startswith("encoder.") for name in changed - of_norms)


def test_an_image_without_an_object_teaches_the_background() -> None:
    task = Config(name="detection", width=8, hidden=8, rpn_post_nms_top_n=20, box_batch_size_per_image=8).build(
        encoder(size=32), 2
    )
    nothing = {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)}
    batch = Batch(TrainProgress(0, 1, 1), torch.arange(2), [torch.randn(2, 3, 32, 32)], target=[nothing, nothing])
    loss = task(batch).loss
    loss.backward()
    assert loss.isfinite()
    learned = [p for p in task.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)
