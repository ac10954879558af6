"""Every published recipe starts on stand-in images or is built as published, says where it is from, and stands in docs/recipes.md as it is."""

from __future__ import annotations

import inspect
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision import datasets

from ssl_pipeline.config.command import load
from ssl_pipeline.config.compose import choices, config_root
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.source import SourceConfig
from ssl_pipeline.data.sources.folder import Config as Folder
from ssl_pipeline.data.sources.torchvision import DATASETS
from ssl_pipeline.data.sources.torchvision import Config as Torchvision
from ssl_pipeline.data.splits import Split
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.engine.optim import build_optimizer
from ssl_pipeline.evaluation.online import OnlineEvaluation
from ssl_pipeline.logging.jsonl import read_metrics
from ssl_pipeline.models.encoder import EncoderSpec
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.pretrain_config import PretrainConfig
from tests.runs import ROOT, SMALL_HEADS

OWN = {"quickstart_pretrain", "quickstart_study"}  # measured here: docs/results/quickstart.md
RECIPES = [name for name in choices("recipe") if name not in OWN]
SIDES = {"CIFAR10": 32, "CIFAR100": 32, "STL10": 96, "Imagenette": 160}
DATA = {"CIFAR10": "CIFAR-10", "CIFAR100": "CIFAR-100", "STL10": "STL-10"}
FOLDERS = {"imagenet": "ImageNet", "imagenet100": "ImageNet-100"}


class StandIn(SourceConfig):
    """Random images of a dataset's size, where torchvision would read its own."""

    name: str = "stand_in"
    side: int

    def open(self, split: Split) -> ArrayDataset:
        count, generator = {"train": 8, "val": 2, "test": 2}[split], torch.Generator().manual_seed(len(split))
        pixels = torch.randint(0, 256, (count, 3, self.side, self.side), generator=generator, dtype=torch.uint8)
        return ArrayDataset("stand-in", pixels, torch.arange(count) % 2, ("a", "b"), mean=(0.5,) * 3, std=(0.3,) * 3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ImageNet's is: train/ and val/, one folder per class, files of several sizes."""
    root = tmp_path_factory.mktemp("photos")
    for part, count in (("train", 5), ("val", 1)):
        for label in ("n01", "n02"):
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                values = torch.randint(0, 256, (90 + 7 * i, 120, 3), dtype=torch.uint8).numpy()
                Image.fromarray(values).save(root / part / label / f"{i}.jpg")
    return root


@cache
def published(recipe: str) -> PretrainConfig:
    return load("pretrain", PretrainConfig, [f"recipe={recipe}"])


def shrunk(recipe: str, photos: Path, output: Path) -> PretrainConfig:
    """The recipe as published but for its batch, its length, the widths of its heads, and views of 224 px.

    ResNets at 224 px take seconds a step here: they see 80 px, where they still have their published stem.
    """
    config = published(recipe)
    small = SMALL_HEADS | {"queue": 8}  # no longer than the data
    heads = [f"pretext.{key}={size}" for key, size in small.items() if getattr(config.pretext, key, None)]
    queue_at_once = ["pretext.queue_start=1 steps"] if hasattr(config.pretext, "queue_start") else []
    size = ["transform.size=80", "transform.local_views.size=40"] if config.transform.size > 96 else []
    folder = [f"data.path={photos}", "data.val=0.2"] if isinstance(config.data, Folder) else []
    loaded = load(
        "pretrain",
        PretrainConfig,
        [
            f"recipe={recipe}", *heads, *queue_at_once, *size, *folder, "batch_size=4", "steps=2", "optim.warmup=1 steps",
            "tracking=off", "log_every=1", "num_workers=0", "evaluate_every=0 steps", f"output={output}",
        ],
    )  # fmt: skip
    if isinstance(config.data, Torchvision):
        return loaded.model_copy(update={"data": StandIn(side=SIDES[config.data.dataset])})
    return loaded


@pytest.fixture
def _lean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither looks at the encoder nor keeps a state to resume from: both are the same for all recipes, and take longest."""
    monkeypatch.setattr(OnlineEvaluation, "__call__", lambda *_: {})
    monkeypatch.setattr(Checkpoints, "save", lambda *_: None)


# A recipe of each pretext task, that of the smallest images, really runs.
STARTED = {
    published(recipe).pretext.name: recipe for recipe in sorted(RECIPES, key=lambda r: -published(r).transform.size)
}


@pytest.mark.parametrize("recipe", sorted(STARTED.values()))
@pytest.mark.usefixtures("_lean")
def test_a_recipe_starts(recipe: str, photos: Path, tmp_path: Path) -> None:
    run = pretrain(shrunk(recipe, photos, tmp_path / "run"))
    losses = [line["pretrain/loss"] for line in read_metrics(run) if "pretrain/loss" in line]
    assert len(losses) == 2
    assert torch.isfinite(torch.tensor(losses)).all()
    encoder = load_file(run / "encoder.safetensors")
    assert all(torch.isfinite(value).all() for value in encoder.values())
    assert encoder["backbone.trunk.conv1.weight"].shape[2:] == published_stem(recipe)
    assert encoder["backbone.trunk.layer1.0.bn1.bias"].abs().max() > 0  # it starts at zero
    shutil.rmtree(run)  # pytest would keep a hundred megabytes of each


def published_stem(recipe: str) -> tuple[int, int]:
    return (3, 3) if published(recipe).transform.size <= 64 else (7, 7)


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - set(STARTED.values())))
def test_the_other_recipes_are_built_with_their_published_widths(recipe: str) -> None:
    config, many = published(recipe), 100_000
    pixels = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(many, 3, 8, 8)
    source = ArrayDataset("stand-in", pixels, torch.arange(many) % 2, ("a", "b"))
    config.check(source, 1)
    config.transform.for_channels(3)
    blueprint = EncoderSpec(
        backbone=config.backbone,
        neck=config.neck,
        channels=3,
        size=config.transform.size,
        mean=(0.5,) * 3,
        std=(0.3,) * 3,
    )
    with torch.device("meta"):  # all shapes and no memory
        task = config.pretext.build(blueprint.build()[0], source)
    assert task.state_dict()["encoder.backbone.trunk.conv1.weight"].shape[2:] == published_stem(recipe)
    optimizer = build_optimizer(config.optim, task, config.batch_size)
    learned = {id(parameter) for parameter in task.parameters() if parameter.requires_grad}
    assert {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} == learned


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_asks_for_data_that_there_is(recipe: str) -> None:
    data = published(recipe).data
    if isinstance(data, Torchvision):
        assert data.dataset in DATASETS
        assert set(data.options) <= set(inspect.signature(getattr(datasets, data.dataset)).parameters)
    else:
        assert isinstance(data, Folder)


def head_of(recipe: str) -> str:
    text = (config_root() / "recipe" / f"{recipe}.yaml").read_text()
    return text.split("\ndefaults:")[0]


def said(recipe: str, what: str) -> str:
    found = re.search(rf"^# {what}: (.+)$", head_of(recipe), re.MULTILINE)
    assert found, f"{recipe} does not say: {what}"
    return found[1]


def command_of(recipe: str) -> str:
    return head_of(recipe).splitlines()[2].removeprefix("#   ")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_head_tells_what_the_recipe_does(recipe: str) -> None:
    config, title = published(recipe), head_of(recipe).splitlines()[1]
    length = re.search(r"(\d+) epochs at batch (\d+)", title)
    assert length
    assert (config.epochs, config.batch_size) == (int(length[1]), int(length[2]))
    assert config.backbone.name == re.sub(r".*(ResNet)-(\d+).*", lambda found: f"resnet{found[2]}", title)
    assert data_of(recipe) in title
    words = command_of(recipe).split()
    assert f"recipe={recipe}" in words
    load("pretrain", PretrainConfig, [word for word in words if "=" in word])


def data_of(recipe: str) -> str:
    data = published(recipe).data
    if isinstance(data, Torchvision):
        return DATA.get(data.dataset, data.dataset)
    assert isinstance(data, Folder)
    return FOLDERS[data.path]


def row_of(recipe: str) -> str:
    """The recipe's row in docs/recipes.md."""
    method = head_of(recipe).splitlines()[1].removeprefix("# ").split(" on ")[0]
    figure, source = (said(recipe, what) for what in ("Published, not reproduced here", "Source"))
    link = f"[`{recipe}`](../configs/recipe/{recipe}.yaml)"
    return f"| {link} | {data_of(recipe)} | {method} | {figure} | {source} | `{command_of(recipe)}` |"


def test_the_page_has_each_recipe_as_it_is() -> None:
    lines = (ROOT / "docs" / "recipes.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| [")] == [row_of(recipe) for recipe in RECIPES]
    assert all(f"../configs/recipe/{recipe}.yaml" in "\n".join(lines) for recipe in OWN)
