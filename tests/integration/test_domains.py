"""Stage two across domains: what it is measured on, what it may not see, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.config.compose import choices
from ssl_pipeline.data.dataset import ArrayDataset, IndexedDataset
from ssl_pipeline.data.image_files import FileDataset
from ssl_pipeline.data.sources.fashion_domains import Config
from ssl_pipeline.data.splits import Split
from ssl_pipeline.domain.adaptation.shot_im import Config as ShotIM
from ssl_pipeline.domain.adaptation.source_only import Config as SourceOnly
from ssl_pipeline.domain.domain_split import split_domains
from ssl_pipeline.downstream.labels import LabelsConfig
from ssl_pipeline.downstream.load_model import load_model
from ssl_pipeline.downstream.regime import Best
from ssl_pipeline.evaluation.result import Result
from ssl_pipeline.finetune import finetune
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.schedules import TrainProgress
from tests.runs import ROOT, tiny_pretrain

TINY = [
    "data=fashion_domains", "domain.source=[original]", "domain.target=[edges]", "tracking=off", "backbone.width=4", "size=12",
    "regime=scratch", "regime.length=3 steps", "regime.min_steps=0", "labels.per_class=20", "data.val=4000", "split=val",
]  # fmt: skip


def tiny(output: Path, *overrides: str) -> Result:
    return finetune(load("finetune", FinetuneConfig, [*TINY, f"output={output}", *overrides]))


def few(labels: bool = True, domains: bool = True) -> ArrayDataset:
    """Twelve images of three classes in two domains."""
    pixels = torch.randint(0, 256, (12, 1, 12, 12), dtype=torch.uint8)
    source = ArrayDataset("few", pixels, domains=torch.arange(12) // 6 if domains else None)
    if domains:
        source.domain_names = ("photo", "sketch", "painting")
    if labels:
        source.labels, source.classes = torch.arange(12) % 3, ("cat", "dog", "elk")
    return source


def method(**keys: object) -> SourceOnly:
    return SourceOnly.model_validate({"name": "source_only", "target": ["sketch"], **keys})


@pytest.mark.parametrize("name", ["dann", "exemplar_memory"])
def test_hidden_labels_of_the_target_change_no_weight(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(tmp_path / "as it is", f"domain={name}")
    opened = Config.open

    def permuted(self: Config, split: Split) -> ArrayDataset:
        source = opened(self, split)
        if split == "train":
            assert source.domains is not None
            assert source.labels is not None
            target = (source.domains == 3).nonzero()[:, 0]
            source.labels[target] = source.labels[target].flip(0)
        return source

    monkeypatch.setattr(Config, "open", permuted)
    tiny(tmp_path / "permuted", f"domain={name}")
    first, second = (load_file(tmp_path / run / "model.safetensors") for run in ("as it is", "permuted"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_figures_are_the_targets_then_each_domains(tmp_path: Path) -> None:
    result = tiny(
        tmp_path / "run",
        "domain=source_only",
        "domain.target=[edges,inverted]",
        "domain.target_labels=2",
        "labels.validation=0.2",
    )
    figures = result.figures[0]
    assert next(iter(figures)) == "accuracy"
    of_targets = [figures["accuracy/edges"], figures["accuracy/inverted"]]
    assert figures["accuracy"] == pytest.approx(sum(of_targets) / 2)
    assert figures["worst_domain_accuracy"] == min(of_targets)
    assert "accuracy/original" in figures
    assert {"label_free/entropy", "label_free/snd", "source_validation"} <= set(figures)
    rows = {row[0]: row[1] for row in result.rows(in_percent=True)}
    assert rows["label_free/snd"] == f"{figures['label_free/snd']:.4g}"


def test_a_few_labels_of_the_target_join_the_sources() -> None:
    across = split_domains(method(target_labels=1), few(), few())
    joined = across.labeled(seed=0)
    assert joined.domains is not None
    assert joined.labels is not None
    assert joined.labels[joined.domains == 1].sort().values.tolist() == [0, 1, 2]
    assert int((joined.domains == 0).sum()) == 6
    assert across.target.labels is None
    with pytest.raises(ConfigError, match=r"`domain.target_labels` is 3, and class 'cat' has only 2"):
        split_domains(method(target_labels=3), few(), few()).labeled(seed=0)


def test_labels_of_the_target_are_added_and_choose_nothing() -> None:
    task = load("finetune", FinetuneConfig, [*TINY, "domain=dann"]).downstream
    across = split_domains(method(target_labels=1), few(), few())
    drawn = across.draw(LabelsConfig(per_class=2, validation=0.5), task, seed=0)
    assert drawn.validation is not None
    assert drawn.train.domains is not None
    assert drawn.validation.domains is not None
    assert drawn.train.domains.bincount().tolist() == [3, 3]
    assert drawn.validation.domains.tolist() == [0, 0, 0]
    plain = split_domains(method(), few(), few()).draw(LabelsConfig(per_class=2, validation=0), task, seed=0)
    assert plain.train.domains is not None
    assert plain.train.domains.tolist() == [0] * 6


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Of some methods, after the same few steps."""
    root, found = tmp_path_factory.mktemp("methods"), {}
    for name in ("source_only", "adabn", "dann", "coral", "mcc", "shot_im", "weight_averaging", "erm"):
        tiny(root / name, f"domain={name}", "labels.validation=0")
        found[name] = load_file(root / name / "model.safetensors")
    tiny(root / "off", "domain=coral", "domain.weight=0", "domain.joint_forward=false", "labels.validation=0")
    tiny(root / "on", "domain=coral", "domain.weight=1", "domain.joint_forward=false", "labels.validation=0")
    return found | {name: load_file(root / name / "model.safetensors") for name in ("off", "on")}


def differs(first: dict[str, Tensor], second: dict[str, Tensor], part: str = "") -> bool:
    return any(not torch.equal(first[key], second[key]) for key in first if part in key)


def test_each_methods_own_part_takes_part(weights: dict[str, dict[str, Tensor]]) -> None:
    plain = weights["source_only"]
    for name in ("dann", "coral", "mcc"):
        assert differs(weights[name], plain, "head"), name
    assert differs(weights["on"], weights["off"], "head")  # the term, and not the forward over both alone
    assert differs(weights["weight_averaging"], weights["erm"], "head")


def test_adabn_takes_statistics_alone_after_the_sources_training(weights: dict[str, dict[str, Tensor]]) -> None:
    first, second = weights["adabn"], weights["source_only"]
    changed = {key.rpartition(".")[2] for key in first if not torch.equal(first[key], second[key])}
    assert changed
    assert changed <= {"running_mean", "running_var", "num_batches_tracked"}


def test_shot_keeps_the_head_that_labels_taught_and_moves_the_rest(weights: dict[str, dict[str, Tensor]]) -> None:
    first, second = weights["shot_im"], weights["source_only"]
    assert not differs(first, second, "head.")
    assert differs(first, second, "backbone.")


@pytest.mark.parametrize(("name", "chooses"), [("erm", True), ("mixstyle", True), ("dann", False), ("shot_im", False)])
def test_labels_choose_the_step_of_generalization_alone(
    name: str, chooses: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, evaluate = list[int](), Best.evaluate

    def counted(self: Best, clock: TrainProgress) -> Mapping[str, float]:
        looked.append(clock.step)
        return evaluate(self, clock)

    monkeypatch.setattr(Best, "evaluate", counted)
    tiny(tmp_path / "run", f"domain={name}", "labels.validation=0.2")
    assert bool(looked) == chooses


def test_unknown_classes_are_out_of_the_source_and_apart_in_the_target() -> None:
    across = split_domains(method(known=["elk", "cat"]), few(), few())
    assert across.source.classes == ("cat", "elk")
    assert across.source.labels is not None
    assert across.source.labels.tolist() == [0, 1, 0, 1]
    assert len(across.target) == 6
    assert len(across.measured["sketch"]) == 4
    assert across.unknown is not None
    assert len(across.unknown) == 2


def test_without_a_shift_the_target_is_the_sources_other_half() -> None:
    across = split_domains(method(negative_control="no_shift"), few(), few())
    assert across.targets == ("photo",)
    assert list(across.measured) == ["photo"]
    assert across.target.labels is None
    pool = few()
    assert pool.pixels is not None
    sides = [side.pixels for side in (across.source, across.target)]
    assert sides[0] is not None
    assert sides[1] is not None
    both = torch.cat([sides[0], sides[1]]).flatten(1).tolist()
    assert len(sides[0]) == 3
    assert len(set(map(tuple, both))) == 6


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("control", ["noise", "shuffled"])
def test_a_control_takes_the_targets_place_in_training_alone(control: str, in_files: bool, tmp_path: Path) -> None:
    pool = few()
    if in_files:
        for number in range(12):
            pool.open_image(number).save(tmp_path / f"{number:02}.png")
        files = FileDataset("few", tmp_path, [f"{number:02}.png" for number in range(12)], 1, pool.labels, pool.classes)
        files.domains, files.domain_names = pool.domains, pool.domain_names
    images: IndexedDataset = files if in_files else pool
    plain = split_domains(method(), images, images).target
    across = split_domains(method(negative_control=control), images, images)

    def values(source: IndexedDataset, number: int) -> Tensor:
        found: Tensor = pil_to_tensor(source.open_image(number))
        return found

    assert len(across.target) == len(plain)
    for number in range(len(plain)):
        real, found = values(plain, number), values(across.target, number)
        assert not torch.equal(real, found)
        same_colors = torch.equal(real.flatten().sort().values, found.flatten().sort().values)
        assert same_colors == (control == "shuffled")
    again = split_domains(method(negative_control=control), images, images).target
    assert torch.equal(values(again, 3), values(across.target, 3))
    assert torch.equal(values(across.target.select(torch.tensor([3])), 0), values(across.target, 3))
    assert torch.equal(values(across.measured["sketch"], 1), values(plain, 1))
    assert across.target.labels is None


def test_a_finished_model_goes_to_the_target_without_its_sources_images(tmp_path: Path) -> None:
    tiny(tmp_path / "source", "domain=source_only", "downstream.bottleneck.width=5")
    alone = [f"domain.model={tmp_path / 'source'}", "domain.source=null", "data.domains=[edges]", "regime=lp_ft"]
    figures = tiny(tmp_path / "adapted", "domain=shot_im", *alone, "domain.adaptation.length=2 steps").figures[0]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "adapted"))
    assert load_model(tmp_path / "adapted").config == load_model(tmp_path / "source").config
    assert first.keys() == second.keys()  # the model's own bottleneck, whatever the method's YAML says
    assert not differs(first, second, "head.")
    assert differs(first, second, "backbone.")
    assert {name for name in figures if name.startswith("accuracy/")} == {"accuracy/edges"}
    with pytest.raises(ConfigError, match=r"without its source's images: `domain.source` can't be had"):
        tiny(tmp_path / "no", "domain=shot_im", *alone, "domain.source=[original]", "data.domains=[original,edges]")
    with pytest.raises(ConfigError, match=r"`domain.model` brings its own encoder"):
        tiny(tmp_path / "no", "domain=shot_im", *alone, f"encoder={tmp_path / 'source'}")
    assert not (tmp_path / "no").exists()


def test_a_finished_models_classes_keep_its_order() -> None:
    start = ShotIM(name="shot_im", target=["sketch"], model="finished")
    across = split_domains(start, few(), few(), ("elk", "yak", "dog", "cat"))
    assert len(across.source) == 0
    assert list(across.measured) == ["sketch"]
    images = across.measured["sketch"]
    assert images.classes == ("elk", "yak", "dog", "cat")
    assert images.labels is not None
    assert images.labels.tolist() == [3, 2, 0, 3, 2, 0]
    with pytest.raises(ConfigError, match=r"has classes that the model in 'finished' does not know. It knows elk, cat"):
        split_domains(start, few(), few(), ("elk", "cat"))
    with pytest.raises(ConfigError, match=r"knows yak, and few has cat, dog, elk: they share no class"):
        split_domains(start, few(), few(), ("yak",))


@pytest.mark.parametrize(("keys", "sentence"), [
    ({"target": ["drawing"]}, r"`domain.target`: few has no training image of 'drawing'. Its domains: photo, sketch."),
    ({"source": ["painting"]}, r"`domain.source`: few has no training image of 'painting'"),
    ({"target": []}, r"`domain.target` is required: one or more of photo, sketch"),
    ({"source": ["sketch"]}, r"both name sketch"),
    ({"target": ["photo", "sketch"]}, r"no domain is left to learn from"),
    ({"known": ["cat", "cow"]}, r"`domain.known`: 'cow': name two or more of cat, dog, elk"),
])  # fmt: skip
def test_wrong_domains_are_told(keys: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        split_domains(method(**keys), few(), few())


def test_images_without_domains_or_labels_are_told() -> None:
    with pytest.raises(ConfigError, match="few has none: take data=domain_folder"):
        split_domains(method(), few(domains=False), few())
    with pytest.raises(ConfigError, match="few has no labels to learn from"):
        split_domains(method(), few(labels=False), few())
    bare = few()
    assert bare.labels is not None
    bare.labels[:6] = -1
    with pytest.raises(ConfigError, match="no image of photo has a label"):
        split_domains(method(), bare, few())


def test_classes_of_the_target_alone_are_told() -> None:
    pool = few()
    assert pool.labels is not None
    pool.labels[:6] = torch.tensor([0, 1, 0, 1, 0, 1])
    with pytest.raises(ConfigError, match=r"sketch has classes that no source image has: elk. Leave them out, or name"):
        split_domains(method(), pool, few())
    held_out = few()
    assert held_out.labels is not None
    held_out.labels[6:] = 2
    with pytest.raises(ConfigError, match="sketch shares no class with the source: it has elk"):
        split_domains(method(), pool, held_out)
    with pytest.raises(ConfigError, match="few has no labeled image of sketch to measure on"):
        split_domains(method(), few(), few().select(torch.arange(6)))


def test_what_does_not_go_together_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`domain=dann` moves the encoder"):
        tiny(tmp_path / "run", "domain=dann", "regime=frozen", "init=random")
    with pytest.raises(ConfigError, match=r"hides the target, and `domain.target_labels` teaches 2"):
        tiny(tmp_path / "run", "domain=dann", "domain.negative_control=noise", "domain.target_labels=2")
    with pytest.raises(ConfigError, match="this is retrieval"):
        tiny(tmp_path / "run", "domain=source_only", "downstream=retrieval")
    with pytest.raises(ConfigError, match=r"`domain.name` is required"):
        tiny(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_view_that_is_the_shift_is_refused(tmp_path: Path) -> None:
    inverted = ["domain=source_only", "domain.target=[inverted]", "transform.solarize=0.2"]
    with pytest.raises(
        ConfigError, match=r"`transform.solarize` inverts images, and that is what the domain inverted is"
    ):
        tiny(tmp_path / "run", *inverted)
    tiny(tmp_path / "edges", *inverted[::2], "domain.target=[edges]")
    data, second = Config(name="fashion_domains", domains=("original",)), ["transform.second_view.solarize=0.2"]
    assert data.shown_by_views(tiny_pretrain(None, *second).transform.each(), data.open("val").absent_domains)
    assert not data.shown_by_views(tiny_pretrain(None, *second).transform.each(), ["edges"])
    assert not data.shown_by_views(tiny_pretrain(None).transform.each(), data.open("val").absent_domains)


def test_classes_that_were_never_taught_are_measured_as_unknown(tmp_path: Path) -> None:
    known = "domain.known=[Trouser,Dress,Sandal,Bag]"
    figures = tiny(
        tmp_path / "run", "domain=erm", known, "domain.source=null", "data.domains=[original,edges]"
    ).figures[0]
    assert {name for name in figures if name.startswith("class_accuracy/")} <= {
        f"class_accuracy/{name}" for name in ("Trouser", "Dress", "Sandal", "Bag")
    }
    for score in ("msp", "max_logit", "energy", "knn"):
        assert 0 <= figures[f"open/{score}/oscr"] <= figures["accuracy"] + 1e-6
        assert {f"open/{score}/{name}" for name in ("auroc", "aupr_unknown", "fpr_at_95_known", "hos")} <= set(figures)
    model = load_file(tmp_path / "run" / "model.safetensors")
    assert len(model["head.weight"]) == 4


def test_a_single_domain_leaves_none_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no domain is left to learn from: fashion_domains has edges"):
        tiny(tmp_path / "run", "domain=erm", "domain.source=null", "data.domains=[edges]")


def test_a_method_of_ones_own_is_one_file_and_one_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page that says how is run as it stands."""
    page = (ROOT / "docs" / "add_adaptation.md").read_text()
    code, yaml = page.split("```python\n")[1].split("```")[0], page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "their_methods").mkdir()
    (tmp_path / "their_methods" / "mine.py").write_text(code)
    (tmp_path / "conf" / "domain").mkdir(parents=True)
    (tmp_path / "conf" / "domain" / "mine.yaml").write_text(yaml.replace("name: mine", "name: their_methods.mine"))
    monkeypatch.syspath_prepend(tmp_path)
    words = [*TINY, "domain=mine", f"output={tmp_path / 'run'}"]
    assert "accuracy/edges" in finetune(load("finetune", FinetuneConfig, words, tmp_path / "conf")).figures[0]


def test_the_page_has_every_method() -> None:
    page = (ROOT / "docs" / "domains.md").read_text()
    assert {name for name in choices("domain") if f"| `{name}` |" in page} == set(choices("domain"))


def test_stage_one_takes_the_domains_that_it_is_given(tmp_path: Path) -> None:
    for domains, count in (("[original]", 1000), ("[original,edges]", 2000)):
        config = tiny_pretrain(
            tmp_path / str(count), "data=fashion_domains", f"data.domains={domains}", "data.val=4000", "steps=1"
        )
        source = config.data.open("train")
        assert source is not None
        assert len(source) == count
    assert (pretrain(config) / "encoder.safetensors").is_file()
