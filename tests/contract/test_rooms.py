"""Every member of a room keeps its contract, has its YAML, and survives saving and loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssl_pipeline.config.base import ConfigError, dump
from ssl_pipeline.config.command import load
from ssl_pipeline.config.compose import choices, config_root
from ssl_pipeline.config.schema import names, resolve
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.splits import Split
from ssl_pipeline.engine.task import PretextConfig, Task
from ssl_pipeline.finetune import finetune
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import EncoderSpec
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.pretrain_config import PretrainConfig
from ssl_pipeline.schedules import TrainProgress
from ssl_pipeline.study.grid import StudyConfig, cells
from tests.runs import FEW_IMAGES, forked, small_pretext

GROUPS = {"pretext": "pretext", "downstream": "downstream", "data": "data.sources", "domain": "domain"}
REQUIRED = {
    name: ["data.path=x"]
    for name in ("folder", "domain_folder", "table", "webdataset", "huggingface", "mask_folder", "coco")
}
REQUIRED["torchvision"] = ["data.dataset=CIFAR10"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("group", GROUPS)
def test_every_component_has_its_yaml(group: str) -> None:
    assert set(names(GROUPS[group])) <= set(choices(group))


def task_of(name: str) -> tuple[Task, Batch]:
    config = load("pretrain", PretrainConfig, small_pretext(name)).pretext
    assert isinstance(config, PretextConfig)
    pixels = torch.randint(0, 256, (8, 1, 12, 12), dtype=torch.uint8)
    labels = torch.arange(8) % 2
    source = ArrayDataset("random", pixels, labels, ("a", "b"))
    blueprint = EncoderSpec(
        backbone=BackboneConfig(width=4), neck=NeckConfig(), channels=1, size=12, mean=(0.0,), std=(1.0,)
    )
    task = config.build(blueprint.build()[0], source)
    views = [torch.randn(8, 1, 12, 12) for _ in range(config.views_needed or 2)]
    return task, Batch(TrainProgress(0, 10, 1), torch.arange(8), views, labels if task.reads_labels else None)


@pytest.mark.parametrize("name", names("pretext"))
def test_a_pretext_task_trains_its_encoder_and_keeps_all_state(name: str) -> None:
    task, batch = task_of(name)
    output = task(batch)
    assert output.loss.ndim == 0
    output.loss.backward()
    learned = {id(p): p for p in task.parameters() if p.requires_grad}
    # Several processes would wait for ever for a parameter without a gradient.
    assert all(p.grad is not None for p in learned.values())
    assert {id(p) for g in task.param_groups() for _, p in g["params"]} == set(learned)
    task.after_step(batch)
    other, _ = task_of(name)
    other.load_state_dict(task.state_dict())
    again, once_more = task.eval()(batch).loss, other.eval()(batch).loss
    assert torch.equal(again, once_more)


RECIPES = choices("recipe")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_whole(recipe: str) -> None:
    head = (config_root() / "recipe" / f"{recipe}.yaml").read_text()
    assert head.startswith(("# @package _global_",))
    if recipe.endswith("pretrain"):
        load("pretrain", PretrainConfig, [f"recipe={recipe}"])
    elif recipe.endswith("finetune"):
        load("finetune", FinetuneConfig, [f"recipe={recipe}"])
    else:
        study = load("study", StudyConfig, [f"recipe={recipe}", "encoders.pretrained=x"])
        grid = cells(study)
        assert {cell.row["regime"] for cell in grid["random"]} == {"frozen", "scratch"}
        assert {cell.row["regime"] for cell in grid["pretrained"]} == set(study.regimes)


def test_a_dumped_configuration_resolves_to_itself() -> None:
    for stage, schema in (("pretrain", PretrainConfig), ("finetune", FinetuneConfig)):
        config = load(stage, schema)
        assert resolve(schema, dump(config)) == config


def test_every_choice_of_every_group_is_valid() -> None:
    for group in ("transform", "backbone", "optim", "tracking", "data", "pretext"):
        for choice in choices(group):
            extra = REQUIRED.get(choice, [])
            assert load("pretrain", PretrainConfig, [f"{group}={choice}", *extra])
    for group in ("regime", "downstream", "domain"):
        for choice in choices(group):
            assert load("finetune", FinetuneConfig, [f"{group}={choice}"])


def test_a_users_own_task_is_one_file_and_one_yaml(tmp_path: Path) -> None:
    """The page that says how is run as it stands."""
    page = (ROOT / "docs" / "add_pretext.md").read_text()
    code, yaml = page.split("```python\n")[1].split("```")[0], page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "their_package").mkdir()
    (tmp_path / "their_package" / "mine.py").write_text(code)
    (tmp_path / "conf" / "pretext").mkdir(parents=True)
    (tmp_path / "conf" / "pretext" / "mine.yaml").write_text(yaml.replace("name: mine", "name: their_package.mine"))
    words = [
        "pretext=mine",
        "--config-dir",
        "conf",
        "steps=2",
        "batch_size=16",
        "tracking=off",
        "output=run",
        "transform.size=12",
    ]
    words += ["backbone.width=4", FEW_IMAGES]
    done = forked("-m", "ssl_pipeline.pretrain", *words, cwd=tmp_path, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "encoder.safetensors").is_file()


def test_a_users_own_source_is_one_file_and_one_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "add_source.md").read_text()
    code, yaml = page.split("```python\n")[1].split("```")[0], page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "their_sources").mkdir()
    (tmp_path / "their_sources" / "mine.py").write_text(code)
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "mine.yaml").write_text(yaml.replace("name: mine", "name: their_sources.mine"))
    monkeypatch.syspath_prepend(tmp_path)
    data = load("pretrain", PretrainConfig, ["data=mine", "data.count=100"], tmp_path / "conf").data
    assert [len(data.open(split) or ()) for split in SPLITS] == [72, 8, 20]
    linked = {name for name in choices("data") if f"configs/data/{name}.yaml" in page}
    assert linked == set(choices("data"))


def test_a_users_own_downstream_task_is_one_file_and_one_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "add_downstream.md").read_text()
    code, yaml = page.split("```python\n")[1].split("```")[0], page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "their_tasks").mkdir()
    (tmp_path / "their_tasks" / "mine.py").write_text(code)
    (tmp_path / "conf" / "downstream").mkdir(parents=True)
    (tmp_path / "conf" / "downstream" / "mine.yaml").write_text(yaml.replace("name: mine", "name: their_tasks.mine"))
    monkeypatch.syspath_prepend(tmp_path)
    words = [
        "downstream=mine", "init=random", "backbone.width=4", "transform.size=12", "tracking=off", "data.val=4000",
        "labels.per_class=20", "split=val", "regime.length=4 steps", "regime.min_steps=0", f"output={tmp_path / 'run'}",
    ]  # fmt: skip
    result = finetune(load("finetune", FinetuneConfig, words, tmp_path / "conf"))
    assert result.interval().mean > 0.15  # of ten classes
    rows = (ROOT / "docs" / "downstream.md").read_text()
    assert all(f"[`{name}`]" in rows for name in names("downstream"))


def test_names_that_are_nowhere_are_told() -> None:
    with pytest.raises(ConfigError, match=r"no module `nowhere\.at_all`"):
        load("pretrain", PretrainConfig, ["pretext.name=nowhere.at_all"])
    with pytest.raises(ConfigError, match="no class `Config`"):
        load("pretrain", PretrainConfig, ["pretext.name=json.decoder"])
