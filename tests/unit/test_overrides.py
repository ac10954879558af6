"""What people type as overrides: texts and paths are taken as they are, and what is not known is answered by the line to type."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import shlex
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import ssl_pipeline
from ssl_pipeline.config.base import ConfigError, FrozenModel, dump
from ssl_pipeline.config.command import load
from ssl_pipeline.config.compose import as_yaml, literal, read_yaml, resolved
from ssl_pipeline.config.schema import component
from ssl_pipeline.config.synonyms import RENAMED_KEYS, renamed
from ssl_pipeline.config.values import listed, quoted, read_value, split_list
from ssl_pipeline.evaluation.load_encoder import describe_encoder
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.pretrain_config import PretrainConfig
from ssl_pipeline.study.domain import DomainStudyConfig, Shift
from ssl_pipeline.study.grid import StudyConfig
from ssl_pipeline.study.label_efficiency import initializations_of

NAMES = [
    "photos", "my photos", " x ", "lr=0.1", "a,b", "(a) (b)", "[a]", "[a", "it's", 'a"b', "#1", "a;b", "a&b", "{a}", "{a", "a!", "日本", "ä",
    "2024", "1e5", "1_0", "0x1f", "true", "off", "~/photos", "$HOME", "${seed}", "${", "\\${x}", "a\\b", "tail\\", "a: b", "- a", "???", "%20",
    "a@b", "*.png", "shards/a-{000..010}.tar", "s3://b/x?a=1&b=2", "a\nb", "+x", "a=~b", "NULL.txt", "ünï cödé/日 本", "..", "-x", "'a' 'b'",
]  # fmt: skip
STAGES: dict[str, type[BaseModel]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "study": StudyConfig}


def told(stage: str, *words: str, config_dir: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(stage, STAGES[stage], list(words), config_dir)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_path_or_a_text_is_taken_as_it_is_typed(name: str, tmp_path: Path) -> None:
    config = load(
        "pretrain", PretrainConfig, ["data=folder", f"data.path={name}", f"output={name}", f"tracking.group={name}"]
    )
    assert [dump(config)["data"]["path"], config.output, config.tracking.group] == [name] * 3
    # What a run writes down is read again as the same.
    (tmp_path / "config.yaml").write_text(as_yaml(dump(config)), encoding="utf-8")
    assert read_yaml(tmp_path / "config.yaml") == dump(config)


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_quotes_hold_whatever_is_between_them(name: str) -> None:
    assert read_value(quoted(name), str | None) == name
    assert read_value(listed([name, name]), tuple[str, ...]) == [name, name]
    assert resolved({"key": literal(name)}) == {"key": name}
    (word,) = (
        describe_encoder([name], ["encoder"])
        if not name.startswith("-") and "=" not in name
        else [f"encoder={quoted(name)}"]
    )
    assert load("finetune", FinetuneConfig, [word]).encoder == name


def test_an_old_key_is_refused_with_its_new_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told("pretrain", "data=folder", "data.path=x", "data.licence=my own") == (
        "`data.licence` is now `data.license`: type `'data.license=my own'`."
    )
    assert "`data.licence` is now `data.license`: type `data.license=…`." in told("pretrain", "data.licence")
    assert told("finetune", "unlabelled=consistency") == (
        "`unlabelled` is now `unlabeled`: type `unlabeled=consistency`."
    )
    with pytest.raises(ConfigError, match=r"is now `data\.license`: type `data\.license=…`"):
        component("data.sources", "data", {"name": "folder", "path": "x", "licence": "mine"})
    # A model has its new names wherever it stands, and a name that the verb lacks is no answer.
    assert "`regime.optim.clip` is now `regime.optim.grad_clip_norm`" in told("finetune", "regime.optim.clip=1")
    assert "`unlabeled.transform.second_view.color_jitter.hue=0`" in told(
        "finetune", "unlabeled=consistency", "unlabeled.views.second.jitter.hue=0"
    )
    assert "`regime.batch_size=64`" in told("finetune", "batch=64")
    assert "`batch_size=64`" in told("pretrain", "batch=64")
    # The same holds for YAML files, for keys below a renamed one, in steps, and where the values are others, too.
    entries = {"sight": "transform", "transform.wide": "transform.size", "optim.calm": "optim.warmup=0 steps"}
    monkeypatch.setattr("ssl_pipeline.config.synonyms.RENAMED_KEYS", entries)
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\nsight: {wide: 32}\n", encoding="utf-8")
    assert told("pretrain", "recipe=mine", "optim.calm=true", config_dir=tmp_path).splitlines() == [
        "`optim.calm` is now `optim.warmup`: type `'optim.warmup=0 steps'`.",
        "`sight.wide` is now `transform.size`: type `transform.size=32`.",
    ]


def fields_of(model: type[BaseModel]) -> set[str]:
    """The keys of a model and of all that derive from it."""
    return set(model.model_fields).union(*map(fields_of, model.__subclasses__()))


def test_every_renamed_key_ends_at_a_key_of_today() -> None:
    for module in pkgutil.walk_packages(ssl_pipeline.__path__, "ssl_pipeline."):
        importlib.import_module(module.name)
    known = fields_of(FrozenModel) | {"comparison"}  # a group of files alone
    for old in RENAMED_KEYS:
        sentence = renamed(old, "1")
        assert sentence is not None
        new = sentence.split("`")[3]  # a circle of entries would end in a RecursionError
        assert set(new.split(".")) <= known, sentence
        assert not set(old.split(".")[-1:]) <= set(new.split(".")[-1:]), sentence


def test_what_a_study_hands_on_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    places = [name for name in ("a b", "lr=0.1", "it's", "日本", "{x}", "a,b") if not Path(name).mkdir()]  # type: ignore[func-returns-value]
    words = initializations_of([*places, "seeds=2", "--", "data=folder", "data.path=my, [own] {photos}=1's"])
    config = load("study", StudyConfig, words)
    assert list(config.encoders.values())[1:] == places
    assert config.common == ("data=folder", "data.path=my, [own] {photos}=1's")
    across = load(
        "study_domain", DomainStudyConfig, ["encoder=runs/a b={seed}'s", "source=日本, it's", "targets=[a b,'c,d']"]
    )
    shift = Shift("x", across.targets[1], list(across.methods))
    row = load("finetune", FinetuneConfig, across.overrides("DANN", shift, 3))
    assert row.domain is not None
    assert (row.encoder, row.domain.source, row.domain.target) == ("runs/a b=3's", ("日本, it's",), ("c,d",))


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("null", str | None, None), ("null", str, "null"), ("null", int, None), ("None", int | None, None), ("None", str | None, "None"),
        ("'2024'", str, "2024"), ('"a b"', str, "a b"), ("'it", str, "'it"), ("'a' 'b'", str, "'a' 'b'"), ("3", int, 3), ("1e-3", float, 0.001),
        ("true", bool, True), ("10 epochs", Any, "10 epochs"), ("7", str | int | None, 7), ("007", str | int | None, "007"),
        ("1e5", str | int | None, "1e5"), ("[a b, c=d,'e,f',2024]", tuple[str, ...], ["a b", "c=d", "e,f", "2024"]), ("[]", tuple[str, ...], []),
        ("[1, 2]", tuple[float, float], [1, 2]), ("[1,10%,all]", tuple[int | str, ...], [1, "10%", "all"]), ("[a", str | tuple[str, ...], "[a"),
        ("[x{0..3}.tar,b]", str | tuple[str, ...], ["x{0..3}.tar", "b"]), ("{a: 1, b: [x]}", dict[str, Any], {"a": 1, "b": ["x"]}),
        ("[transform.crop.scale=[0.8,1.0],x]", tuple[str, ...], ["transform.crop.scale=[0.8,1.0]", "x"]),
    ],
)  # fmt: skip
def test_a_value_is_read_by_the_type_of_its_key(text: str, kind: Any, value: Any) -> None:
    assert read_value(text, kind) == value


def test_a_bracket_that_is_never_closed_is_a_letter() -> None:
    assert split_list("[a(b,c]") == ["a(b", "c"]
    assert split_list("[it's,b]") == ["it's", "b"]


def test_a_folder_of_own_yaml_may_have_any_name(tmp_path: Path) -> None:
    for name in ("a b", "it's", "lr=0.1", "日本", "{x}", "${y}", "a,b", "[c]", "#d", "100%"):
        (tmp_path / name / "pretext").mkdir(parents=True)
        (tmp_path / name / "pretext" / "2024.yaml").write_text("name: simclr\ntemperature: 0.25\n")
        pretext = dump(load("pretrain", PretrainConfig, ["pretext=2024"], tmp_path / name))["pretext"]
        assert pretext["temperature"]["value"] == 0.25


@pytest.mark.parametrize(
    ("stage", "word", "line"),
    [
        ("pretrain", "lr=0.1", "`optim.lr=0.1`"), ("finetune", "lr=0.1", "`regime.optim.lr=0.1`"), ("finetune", "optim.lr=0.1", "`regime.optim.lr=0.1`"),
        ("pretrain", "learning_rate=0.1", "`optim.lr=0.1`"), ("pretrain", "optim.learning_rate=0.1", "`optim.lr=0.1`"),
        ("pretrain", "pretext.lr=0.1", "`optim.lr=0.1`"), ("pretrain", "temperature=0.1", "`pretext.temperature=0.1`"),
        ("pretrain", "tau=0.1", "`pretext.temperature.value=0.1`"), ("pretrain", "bs=64", "`batch_size=64`"),
        ("finetune", "batch_size=64", "`regime.batch_size=64`"),
        ("finetune", "epochs=5", "`'regime.length=5 epochs'`"), ("finetune", "steps=90", "`'regime.length=90 steps'`"),
        ("pretrain", "n_workers=4", "`num_workers=4`"), ("pretrain", "num_workers", "`num_workers=4`"), ("pretrain", "epochs", "`epochs=20`"),
        ("pretrain", "simclr", "`pretext=simclr`"), ("pretrain", "arch=resnet34", "`backbone.name=resnet34`"), ("pretrain", "model=resnet50", "`backbone=resnet50`"),
        ("pretrain", "backbone=resnet34", "`backbone.name=resnet34`"), ("pretrain", "backbone=timm/vit_tiny_patch16_224", "`backbone.name=timm/vit_tiny_patch16_224`"),
        ("pretrain", "method=byol", "`pretext=byol`"), ("pretrain", "queue=99", "`pretext=moco_v2 pretext.queue=99`"),
        ("pretrain", "pretext.queue=99", "`pretext=moco_v2 pretext.queue=99`"), ("pretrain", "dataset=CIFAR10", "`data=torchvision data.dataset=CIFAR10`"),
        ("pretrain", "warmup=5", "`'optim.warmup=5 epochs'`"), ("pretrain", "optim.warmup=5", "'5 epochs', '5 steps' or '5%'"),
        ("pretrain", "img_size=64", "`transform.size=64`"), ("finetune", "img_size=64", "`size=64`"), ("pretrain", "output_dir=a b", "`'output=a b'`"),
        ("pretrain", "device=cpu", "`ACCELERATE_USE_CPU=1 ssl-pipeline pretrain …`"), ("pretrain", "device=cuda:1", "`CUDA_VISIBLE_DEVICES=1 ssl-pipeline pretrain …`"),
        ("finetune", "precision=bf16", "`accelerate launch --mixed_precision bf16 -m ssl_pipeline.finetune …`"),
        ("pretrain", "fp16=true", "`accelerate launch --mixed_precision fp16 -m ssl_pipeline.pretrain …`"),
        ("pretrain", "gpus=4", "`accelerate launch --multi_gpu --num_processes 4 -m ssl_pipeline.pretrain …`"),
        ("pretrain", "tracking=false", "`tracking=off`"), ("pretrain", "tracking=1", "`tracking=auto`"), ("pretrain", "tracking=null", "`tracking=off`"),
        ("pretrain", "recipe=5", "no such choice"), ("pretrain", "optim=null", "adamw, lars, sgd"), ("pretrain", "~optim", "adamw, lars, sgd"),
        ("pretrain", "data=", "An empty shell variable"), ("pretrain", "output=", "`output=null`"), ("pretrain", "transform=", "no such choice"),
        ("pretrain", "pretext=simcrl", "`pretext=simclr`"), ("pretrain", "optim.lr=null", "got null"), ("pretrain", "optim.lr.x=3", "Known of `optim`"),
        ("pretrain", "transform.crop=3", "`transform.crop.scale=3`"), ("finetune", "labels=10", "`labels.per_class=10`"), ("pretrain", "optim.betas=0.9", "`'optim.betas=[0.9]'`"),
        ("finetune", "head=cosine", "`downstream.head=cosine`"), ("finetune", "momentum=0.8", "`regime.optim.momentum=0.8`"), ("pretrain", "=3", "`group=choice`"),
        ("pretrain", "data==3", "no such choice"), ("pretrain", "runs/x=1", "there is no 'runs/x=1'"), ("pretrain", "nonsense=1", "Known: backbone, batch"),
        ("pretrain", "~nonsense", "is not a key"), ("pretrain", "transform.crop.scale=[0.5", "can't be read"), ("study", "data=folder", "is not a key"),
    ],
)  # fmt: skip
def test_what_people_type_is_answered_by_the_line_to_type(stage: str, word: str, line: str) -> None:
    assert line in told(stage, word)


def test_the_lines_that_are_answered_are_right() -> None:
    for stage, word in (
        ("pretrain", "warmup=5"),
        ("finetune", "steps=90"),
        ("pretrain", "queue=99"),
        ("pretrain", "output_dir=it's"),
    ):
        (line,) = told(stage, word).split("`")[-2:-1]
        assert load(stage, STAGES[stage], shlex.split(line))


def test_a_place_is_no_kind_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my photos").mkdir()
    line = "write `data=folder 'data.path=my photos'`"
    for word in ("data=my photos", "data.path=my photos", "my photos", "path=my photos", "data_dir=my photos"):
        assert line in told("pretrain", word).replace("Write", "write")
    assert "`data=table data.path=images.csv`" in told("pretrain", "data=images.csv")
    assert "`data=folder data.path=nowhere`" in told("pretrain", "data.path=nowhere")
    Path("run").mkdir()
    Path("run", "card.json").touch()
    assert "`encoder=run`" in told("finetune", "run")


def test_all_mistakes_are_told_together() -> None:
    text = told("pretrain", "pretext.temprature=1", "optim.lr=-1", "lr=3", "num_workers", "output=")
    assert len(text.splitlines()) == 5


def test_a_key_in_a_file_of_the_users_own_is_answered_too(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\nlr: 0.1\noutput: 2024\n")
    text = told("pretrain", "recipe=mine", config_dir=tmp_path)
    assert "`lr` is not a key. Write `optim.lr=0.1`." in text
    assert "`output`: a text is needed, and YAML reads 2024 as a number: put it in quotes there." in text


def test_a_plain_value_stands_for_a_models_main_key() -> None:
    config = load(
        "pretrain",
        PretrainConfig,
        ["pretext.temperature=0.1", "pretext.temperature.start=0.9", "batch_size=64", "neck=gem", "optim.warmup=0"],
    )
    tree = dump(config)
    assert tree["pretext"]["temperature"]["value"] == 0.1
    assert tree["pretext"]["temperature"]["start"] == 0.9
    assert (config.batch_size, config.neck.name, str(config.optim.warmup)) == (64, "gem", "0 steps")
    downstream = dump(load("finetune", FinetuneConfig, ["downstream.bottleneck=256"]))["downstream"]
    assert downstream["bottleneck"]["width"] == 256
    assert load("finetune", FinetuneConfig, ["domain=null", "unlabeled=null", "recipe=null"]).domain is None


def test_taking_a_key_back_gives_the_value_of_its_yaml() -> None:
    assert load("pretrain", PretrainConfig, ["~optim.lr"]).optim.lr == 0.002
    assert load("pretrain", PretrainConfig, ["optim=sgd", "optim.lr=3", "~optim.lr"]).optim.lr == 0.06
    recipe = load(
        "pretrain",
        PretrainConfig,
        ["recipe=quickstart_pretrain", "~epochs", "~pretext.temperature.value", "~transform.crop"],
    )
    assert (recipe.epochs, dump(recipe)["pretext"]["temperature"]["value"]) == (20, 0.5)
    assert recipe.transform.crop == load("pretrain", PretrainConfig).transform.crop
    assert recipe.backbone.width == 32


def test_of_epochs_and_steps_the_one_that_was_given_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "short.yaml").write_text("# @package _global_\nsteps: 7\n")
    assert load("pretrain", PretrainConfig, ["recipe=short"], tmp_path).total_steps(10_000) == 7
    assert (
        load("pretrain", PretrainConfig, ["recipe=short", "epochs=2", "batch_size=100"], tmp_path).total_steps(10_000)
        == 200
    )
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        assert load("pretrain", PretrainConfig, ["steps=5", "epochs=2"]).total_steps(10_000) == 5
    assert caplog.messages == ["`steps=5` is taken, and `epochs=2` is not: give one of the two."]


def test_an_interpolation_is_looked_up_after_the_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\noutput: runs/${seed}\n")
    monkeypatch.setenv("TASK", "4")
    config = load("pretrain", PretrainConfig, ["recipe=mine", "seed=${oc.env:TASK}"], tmp_path)
    assert (config.seed, config.output) == (4, "runs/4")
