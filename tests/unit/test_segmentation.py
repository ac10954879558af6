"""Segmentation, and the masks it learns from, on images whose right answer is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchmetrics.functional.classification import multiclass_jaccard_index

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.data.build import AnnotatedLoader
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.data.reading import read_in_order
from ssl_pipeline.data.sources import mask_folder
from ssl_pipeline.data.targets import Masks
from ssl_pipeline.downstream.load_model import load_model
from ssl_pipeline.downstream.segmentation import Config, Segmentation
from ssl_pipeline.evaluation.result import Result
from ssl_pipeline.finetune import finetune
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.models.dense_heads import DeepLab
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.pretrain_config import PretrainConfig
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing
from tests.runs import same_bytes
from tests.shapes import NAMES, scene
from tests.shapes import mask_folder as write_folder
from tests.unit.test_downstream_vector import encoder

CPU = DistInfo(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("scenes") / "all", 80, height=32, width=40)


@pytest.fixture(scope="module")
def stage_one(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [
        "tracking=off", "num_workers=0", "data=mask_folder", f"data.path={folder}", "transform=small", "backbone.width=8",
        "batch_size=32", "steps=15", "pretext.hidden_width=16", "pretext.projection_width=16", "evaluate_every=0 steps",
    ]  # fmt: skip
    return pretrain(load("pretrain", PretrainConfig, [*words, f"output={tmp_path_factory.mktemp('one') / 'run'}"]))


def run(folder: Path, output: Path, *overrides: str) -> Result:
    words = ["tracking=off", "num_workers=0", "data=mask_folder", f"data.path={folder}", "downstream=segmentation"]
    short = [f"regime.{key}" for key in ("min_steps=0", "batch_size=16", "optim.lr=0.01")]
    return finetune(load("finetune", FinetuneConfig, [*words, *short, f"output={output}", *overrides]))


@pytest.mark.parametrize(("regime", "least"), [("frozen", 0.5), ("lp_ft", 0.7), ("end_to_end", 0.6), ("scratch", 0.7)])
def test_squares_and_circles_are_told_apart_in_every_regime(
    folder: Path, stage_one: Path, tmp_path: Path, regime: str, least: float
) -> None:
    probe = ["regime.probe.length=40 steps", "regime.probe.min_steps=0", "regime.probe.optim.lr=0.02"]
    length = ["regime.length=40 steps"] if regime != "frozen" else []
    result = run(
        folder, tmp_path / "run", f"regime={regime}", f"encoder={stage_one}", "labels.validation=0", *probe, *length
    )
    assert result.interval("mean_iou").mean > least
    model = load_model(result.folder)
    assert model.card.classes == NAMES
    wanted = scene(500, 64, 90)
    logits = model.predict([Image.fromarray(wanted.image)])
    compared = model.task.compare(logits[0], torch.from_numpy(wanted.mask).long())  # type: ignore[operator]
    assert int(compared.sum()) == 64 * 90


def test_a_mask_follows_its_image_through_the_views(tmp_path: Path) -> None:
    """The images are pictures of their masks, so each view of an image shows what its target must be."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for i in range(6):
        mask = scene(i, 60 + i, 50 - 2 * i).mask
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.png")
        Image.fromarray(mask * 100).convert("RGB").save(tmp_path / "images" / f"{i}.png")
    source = mask_folder.Config(name="mask_folder", path=str(tmp_path)).open("train")
    assert source is not None
    config = load("finetune", FinetuneConfig, ["transform.crop.scale=[0.2,0.6]", "transform.size=24"]).transform
    views = Views(config.for_channels(3)[0], (0.0,) * 3, (1.0,) * 3, 7)
    seen = 0
    for batch in AnnotatedLoader(source, views, 2, 7, CPU, 6, workers=0, with_labels=True).from_step(0):
        shown = batch.views[0][:, 0] * 2.55
        assert batch.target.shape == (2, 24, 24)
        sure = (shown - shown.round()).abs() < 0.02  # away from edges, where an image is interpolated
        assert float(sure.float().mean()) > 0.5
        agrees = (shown.round().long() == batch.target)[sure].float().mean()
        assert float(agrees) > 0.98
        seen += int((batch.target > 0).sum())
    assert seen > 100


def test_images_are_read_whole() -> None:
    pixels = torch.zeros(1, 3, 20, 40, dtype=torch.uint8)
    pixels[..., 36:] = 255
    from ssl_pipeline.data.dataset import ArrayDataset

    whole = Preprocessing(10, (0.0,) * 3, (1.0,) * 3, whole=True)
    (images,) = read_in_order(ArrayDataset("x", pixels), whole, CPU.device)
    assert images[0, 0, :, -1].min() > 0.8  # a central square would have cut it off


def test_figures_are_torchmetrics_and_passes_over_what_has_no_class() -> None:
    torch.manual_seed(0)
    task = Config(name="segmentation").build(encoder(), 4)
    logits, masks = torch.randn(5, 4, 9, 7), torch.randint(0, 3, (5, 9, 7))
    masks[:, :2] = 255
    figures = task.score([task.compare(one, mask) for one, mask in zip(logits, masks, strict=True)])
    guessed = logits.argmax(1)
    each = multiclass_jaccard_index(guessed, masks, 4, average="none", ignore_index=255)
    assert figures["mean_iou"] == pytest.approx(float(each[:3].mean()), abs=1e-5)  # class 3 occurs in no mask
    assert figures["pixel_accuracy"] == pytest.approx(float((guessed == masks)[masks != 255].float().mean()), abs=1e-6)
    assert figures["classes_measured"] == 3
    assert task.score([torch.zeros(4, 4, dtype=torch.int64)]) == {"classes_measured": 0}


@pytest.mark.parametrize(
    ("side", "rates"), [(4, (1, 1, 2)), (7, (1, 3, 4)), (8, (1, 3, 4)), (16, (3, 6, 9)), (33, (6, 12, 18)), (65, (12, 24, 36))]
)  # fmt: skip
def test_every_tap_of_deeplab_sees_the_map(side: int, rates: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    head = DeepLab({"c5": 6}, 3, hidden=4)
    pyramid: Any = head.layers[0]
    branches = [branch for branch in pyramid.convs[1:-1] if branch[0].kernel_size == (3, 3)]
    assert len(branches) == 3
    for branch, rate in zip(branches, rates, strict=True):
        maps = torch.randn(1, 6, side, side, requires_grad=True)
        out = branch[0](maps)
        assert out.shape == (1, 4, side, side)
        expected = F.conv2d(maps, branch[0].weight, padding=rate, dilation=rate)
        assert torch.equal(out, expected)
    head({"c5": torch.randn(2, 6, side, side)}).square().sum().backward()
    alive = [int((branch[0].weight.grad.abs().sum((0, 1)) > 0).sum()) for branch in branches]
    assert alive == [9, 9, 9]


def test_a_frozen_probe_leaves_the_encoder_as_it_was(folder: Path, stage_one: Path, tmp_path: Path) -> None:
    from ssl_pipeline.models.encoder import load_encoder

    result = run(
        folder,
        tmp_path / "run",
        "regime=frozen",
        f"encoder={stage_one}",
        "regime.probe.length=3 steps",
        "regime.probe.min_steps=0",
    )
    before = load_encoder(stage_one)[0].state_dict()
    after = load_model(result.folder).task.encoder.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_permuting_test_masks_changes_no_weight_and_runs_reproduce(
    folder: Path, stage_one: Path, tmp_path: Path
) -> None:
    def whole(name: str, flipped: bool) -> Path:
        root = tmp_path / f"data_{name}"
        source = mask_folder.Config(name="mask_folder", path=str(folder))
        for split, part in (("train", "train"), ("test", "test")):
            annotated = source.open(split)  # type: ignore[arg-type]
            assert annotated is not None
            assert annotated.annotations is not None
            for kind in ("images", "masks"):
                (root / part / kind).mkdir(parents=True)
            for i in range(len(annotated)):
                mask = annotated.annotations.whole(i).numpy().astype(np.uint8)
                changed = mask[::-1] if flipped and part == "test" else mask
                annotated.open_image(i).save(root / part / "images" / f"{i}.png")
                Image.fromarray(changed).save(root / part / "masks" / f"{i}.png")
            (root / "classes.txt").write_text("\n".join(NAMES))
        short = ["regime=lp_ft", "regime.length=3 steps", "regime.probe.length=3 steps", "regime.probe.min_steps=0"]
        return run(root, tmp_path / name, f"encoder={stage_one}", *short, "labels.validation=0.3").folder

    first, again, other = whole("a", False), whole("b", False), whole("c", True)
    assert same_bytes(first, again, ["model.safetensors", "results.json"])
    assert same_bytes(first, other, ["model.safetensors"])
    assert not same_bytes(first, other, ["results.json"])


def test_another_image_size_is_taken_or_refused(folder: Path, stage_one: Path, tmp_path: Path) -> None:
    short = ["regime=frozen", "regime.probe.length=2 steps", "regime.probe.min_steps=0"]
    result = run(folder, tmp_path / "run", f"encoder={stage_one}", "size=48", *short)
    assert load_model(result.folder).card.blueprint.size == 48
    with pytest.raises(ConfigError, match="no multiple of vit_b_32's patches"):
        run(folder, tmp_path / "no", "regime=scratch", "backbone.name=vit_b_32", "size=48")


def test_views_that_masks_cannot_follow_are_refused(folder: Path, stage_one: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="turns images away from their masks"):
        run(folder, tmp_path / "no", f"encoder={stage_one}", "transform.rotation.probability=0.5")


def save(path: Path, array: np.ndarray) -> None:
    Image.fromarray(array).save(path)


def test_what_is_wrong_with_masks_is_told(tmp_path: Path) -> None:
    def opened(root: Path) -> IndexedDataset:
        source = mask_folder.Config(name="mask_folder", path=str(root)).open("train")
        assert source is not None
        assert source.annotations is not None
        return source

    blank = np.zeros((32, 32), np.uint8)
    changes: dict[str, tuple[Callable[[Path], object], str]] = {
        "size": (
            lambda r: save(r / "masks" / "001.png", blank[:20]),
            r"001\.png has 32×20 pixels, and its image .* has 32×32",
        ),
        "number": (lambda r: save(r / "masks" / "001.png", blank + 7), r"holds the number 7, and 3 classes are named"),
        "color": (lambda r: save(r / "masks" / "001.png", np.zeros((32, 32, 3), np.uint8)), "mask of mode RGB"),
        "missing": (lambda r: (r / "masks" / "001.png").unlink(), r"001\.png has no mask"),
        "alone": (lambda r: (r / "images" / "001.png").unlink(), "mask of no image"),
        "damaged": (lambda r: (r / "masks" / "001.png").write_bytes(b"half"), "can't be read as a mask"),
        "nowhere": (lambda r: (r / "masks").rename(r / "labels"), "there is no folder .*masks"),
    }
    for name, (change, sentence) in changes.items():
        root = write_folder(tmp_path / name, 4)
        change(root)
        with pytest.raises(ConfigError, match=sentence):
            opened(root)
    root = write_folder(tmp_path / "fine", 10)
    (root / "classes.txt").unlink()
    assert opened(root).classes == ("0", "1", "2")
    for path in (root / "masks").iterdir():
        save(path, blank)
    mask_folder._read.cache_clear()
    problems = Config(name="segmentation").check(opened(root))
    assert "nothing to tell apart" in problems[0]


def numbered_masks(root: Path, *numbers: int) -> Path:
    """Pairs whose masks hold the numbers in turn, in a square on 0."""
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for i in range(12):
        save(root / "images" / f"{i}.png", np.zeros((16, 16, 3), np.uint8))
        mask = np.zeros((16, 16), np.uint8)
        mask[4:8] = numbers[i % len(numbers)]
        save(root / "masks" / f"{i}.png", mask)
    return root


def test_255_is_no_class_unless_it_is_said_to_be_one(tmp_path: Path) -> None:
    root = numbered_masks(tmp_path / "white", 255)

    def opened(**keys: Any) -> IndexedDataset:
        source = mask_folder.Config(name="mask_folder", path=str(root), **keys).open("train")
        assert source is not None
        assert source.annotations is not None
        return source

    for keys in ({"classes": ("background", "lesion")}, {}):
        with pytest.raises(ConfigError, match=r"hold 0, 255 alone, and 255 means .* `data.values=\[0, 255\]`"):
            opened(**keys)
    source = opened(classes=("background", "lesion"), values=(0, 255))
    masks = source.annotations
    assert isinstance(masks, Masks)
    assert masks.counts[0].tolist() == [192, 64]
    assert masks.whole(0).unique().tolist() == [0, 1]
    assert masks.select(torch.tensor([1])).whole(0).unique().tolist() == [0, 1]
    with pytest.raises(ConfigError, match=r"`data.values` has 3 numbers, and there are 2 classes"):
        opened(classes=("background", "lesion"), values=(0, 1, 255))
    with pytest.raises(ConfigError, match=r"each class needs a number of its own"):
        opened(values=(0, 0))


def test_numbers_with_gaps_are_counted_and_may_be_mapped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = numbered_masks(tmp_path / "coded", 38, 75, 113, 255)
    source = mask_folder.Config(name="mask_folder", path=str(root)).open("train")
    assert source is not None
    assert source.classes is not None
    assert len(source.classes) == 114
    assert "4 of 114 classes occur in the masks: 0, 38, 75, 113 (255, which is there, is no class)" in caplog.text
    assert "`data.values=[0, 38, 75, 113, 255]`" in caplog.text
    mapped = mask_folder.Config(name="mask_folder", path=str(root), values=(0, 38, 75, 113)).open("train")
    assert mapped is not None
    assert mapped.annotations is not None
    assert mapped.classes == ("0", "38", "75", "113")
    assert isinstance(mapped.annotations, Masks)
    found = {int(n) for i in range(len(mapped)) for n in mapped.annotations.whole(i).unique()}
    assert found == {0, 1, 2, 3, 255}
    with pytest.raises(ConfigError, match="holds the number 113, and 3 classes are named"):
        mask_folder.Config(name="mask_folder", path=str(root), values=(0, 38, 75)).open("train")


def test_a_class_that_only_the_test_has_is_told_and_balanced_weights_are_even(tmp_path: Path) -> None:
    blank = np.zeros((16, 16), np.uint8)
    for part, number in (("train", 1), ("test", 2)):
        for kind in ("images", "masks"):
            (tmp_path / part / kind).mkdir(parents=True)
        for i in range(3):
            save(tmp_path / part / "images" / f"{i}.png", np.zeros((16, 16, 3), np.uint8))
            mask = blank.copy()
            mask[:4] = number
            mask[4] = 255
            save(tmp_path / part / "masks" / f"{i}.png", mask)
    source = mask_folder.Config(name="mask_folder", path=str(tmp_path))
    train, test = source.open("train"), source.open("test")
    assert train is not None
    problems = Config(name="segmentation").check(train, test)
    assert "classes that no training mask has: '2'" in problems[0]
    task = Config(name="segmentation", class_weights="balanced").build(encoder(), 3)
    assert isinstance(task, Segmentation)
    task.look_at(train)
    pixels = torch.tensor([11.0, 4.0, 0.0])
    assert (task.class_weight * pixels)[:2].diff().abs() < 1e-4
    assert float((task.class_weight * pixels).sum()) == pytest.approx(15)
