"""Both stages on the embedded images, in this process: from images to a prediction for a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.sources.embedded import Config as Embedded
from ssl_pipeline.downstream.load_model import load_model
from ssl_pipeline.export.predict import predict
from ssl_pipeline.finetune import finetune
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.logging.jsonl import read_metrics
from ssl_pipeline.models.encoder import load_encoder, read
from ssl_pipeline.pretrain import pretrain
from tests.runs import same_bytes, tiny_finetune, tiny_pretrain


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(tiny_pretrain(tmp_path_factory.mktemp("one") / "run", "steps=12", "evaluate_every=6 steps"))


def test_stage_one_leaves_all_that_is_promised(stage_one: Path) -> None:
    names = {path.name for path in stage_one.iterdir()}
    assert {"config.yaml", "run.json", "metrics.jsonl", "encoder.safetensors", "card.json", "checkpoints"} <= names
    lines = read_metrics(stage_one)
    assert "untrained/knn" in lines[0]
    losses = [line["pretrain/loss"] for line in lines if "pretrain/loss" in line]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    looked = [line for line in lines if "eval/knn" in line]
    assert [line["step"] for line in looked] == [6, 12]
    assert {"eval/feature_std", "eval/effective_rank", "eval/alignment", "eval/uniformity"} <= set(looked[0])
    record = json.loads((stage_one / "run.json").read_text())["starts"][0]
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]


def test_the_artifact_loads_strictly_and_under_the_librarys_names(stage_one: Path) -> None:
    encoder, card = load_encoder(stage_one)
    assert card.kind == "encoder"
    assert card.blueprint.channels == 1
    assert any(key == "backbone.trunk.layer1.0.conv1.weight" for key in encoder.state_dict())
    state = load_file(stage_one / "encoder.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())


def test_a_label_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permuting all labels changes no bit of stage one's weights."""
    first = pretrain(tiny_pretrain(tmp_path / "a", "steps=3"))
    opened = Embedded.open

    def shuffled(self: Embedded, split):  # type: ignore[no-untyped-def]
        source = opened(self, split)
        chosen = source.select(torch.arange(len(source)))
        assert chosen.labels is not None
        chosen.labels = chosen.labels.flip(0)
        return chosen

    monkeypatch.setattr(Embedded, "open", shuffled)
    second = pretrain(tiny_pretrain(tmp_path / "b", "steps=3"))
    assert same_bytes(first, second, ["encoder.safetensors"])


@pytest.mark.parametrize("regime", ["frozen", "lp_ft", "end_to_end", "scratch"])
def test_every_regime_gives_a_model_that_predicts_files(stage_one: Path, tmp_path: Path, regime: str) -> None:
    length = [] if regime == "frozen" else ["regime.length=3 steps", "regime.min_steps=0", "regime.batch_size=16"]
    result = finetune(tiny_finetune(stage_one, tmp_path / "run", f"regime={regime}", "seeds=2", *length))
    assert len(result.figures) == 2
    assert 0 <= result.interval().mean <= 1
    model = load_model(result.folder)
    before, _ = load_encoder(stage_one)
    same = all(torch.equal(value, model.task.encoder.state_dict()[key]) for key, value in before.state_dict().items())
    assert same == (regime == "frozen")
    file = tmp_path / "photo.png"
    Image.new("RGB", (50, 40), "red").save(file)
    (tmp_path / "text.png").write_text("no image")
    rows = list(predict(model, [file, tmp_path / "text.png"]))
    assert len(rows[0]["classes"]) == 3
    assert rows[0]["classes"][0] in (model.card.classes or ())
    assert rows[1]["error"] == "it is no image of a known format"


@pytest.mark.parametrize("fresh", ["regime=scratch", "init=random"])
def test_fresh_weights_have_no_statistics_to_keep(stage_one: Path, tmp_path: Path, fresh: str) -> None:
    with pytest.raises(ConfigError, match=r"`regime\.freeze_bn_stats` keeps what stage one has estimated"):
        finetune(tiny_finetune(stage_one, tmp_path / "run", fresh, "regime.freeze_bn_stats=true"))
    assert not (tmp_path / "run").exists()


def test_stage_two_reproduces_and_its_seeds_differ(stage_one: Path, tmp_path: Path) -> None:
    def run(name: str) -> list[dict[str, float]]:
        overrides = ["seeds=2", "regime.length=3 steps", "regime.min_steps=0", "regime.batch_size=16"]
        return finetune(tiny_finetune(stage_one, tmp_path / name, *overrides)).figures

    first, second = run("a"), run("b")
    assert first == second
    assert first[0] != first[1]
    assert same_bytes(tmp_path / "a", tmp_path / "b", ["model.safetensors"])


def test_permuting_test_labels_changes_no_weight(
    stage_one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [
        "labels.validation=0.4",
        "regime.length=3 steps",
        "regime.min_steps=0",
        "regime.batch_size=16",
        "split=test",
    ]
    finetune(tiny_finetune(stage_one, tmp_path / "a", *overrides))
    opened = Embedded.open

    def shuffled(self: Embedded, split):  # type: ignore[no-untyped-def]
        source = opened(self, split)
        if split == "train":
            return source
        chosen = source.select(torch.arange(len(source)))
        assert chosen.labels is not None
        chosen.labels = (chosen.labels + 1) % 10
        return chosen

    monkeypatch.setattr(Embedded, "open", shuffled)
    finetune(tiny_finetune(stage_one, tmp_path / "b", *overrides))
    assert same_bytes(tmp_path / "a", tmp_path / "b", ["model.safetensors"])


def test_wrong_starts_are_told_before_anything_is_written(stage_one: Path, tmp_path: Path) -> None:
    wrong = {
        "labels.per_class=9999": "only",
        "regime=frozen downstream.bottleneck.width=256": "bottleneck",
        "transform.num_views=2": "transform.num_views",
    }
    for overrides, word in wrong.items():
        with pytest.raises(ConfigError, match=word):
            finetune(tiny_finetune(stage_one, tmp_path / "x", *overrides.split(" ")))
    images = tmp_path / "images"
    for name in ("a", "b"):
        (images / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (20, 20), (i, 9 * i, 90)).save(images / name / f"{i}.png")
    config = load_folder(stage_one, images, tmp_path / "x")
    with pytest.raises(ConfigError, match="channel"):
        finetune(config)
    assert not (tmp_path / "x").exists()


def load_folder(encoder: Path, images: Path, output: Path) -> FinetuneConfig:
    from ssl_pipeline.config.command import load

    wanted = ["data=folder", f"data.path={images}", "tracking=off", f"encoder={encoder}", f"output={output}"]
    return load("finetune", FinetuneConfig, wanted)


def test_an_artifact_of_another_architecture_names_the_keys(stage_one: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    card, _ = read(stage_one, "encoder")
    wider = card.blueprint.backbone.model_copy(update={"width": 8})
    changed = card.model_copy(update={"blueprint": card.blueprint.model_copy(update={"backbone": wider})})
    (folder / "card.json").write_text(changed.model_dump_json())
    (folder / "encoder.safetensors").write_bytes((stage_one / "encoder.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"another architecture.*backbone\.trunk\.conv1\.weight"):
        load_encoder(folder)
    (folder / "encoder.safetensors").write_bytes(b"half a fi")
    with pytest.raises(ConfigError, match="damaged"):
        load_encoder(folder)


def test_a_folder_of_files_of_many_sizes_is_pretrained_on(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    torch.manual_seed(0)
    for i in range(40):
        pixels = (torch.rand(30 + i, 50 - i // 2, 3) * 255).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(images / f"{i}.{'png' if i % 2 else 'jpg'}")
    from ssl_pipeline.config.command import load
    from ssl_pipeline.pretrain_config import PretrainConfig

    def run(name: str, workers: int) -> Path:
        wanted = [
            "data=folder", f"data.path={images}", "tracking=off", "transform.size=16", "backbone.width=4", "batch_size=16",
            "steps=4", f"num_workers={workers}", f"output={tmp_path / name}", "pretext.hidden_width=16",
        ]  # fmt: skip
        return pretrain(load("pretrain", PretrainConfig, wanted))

    assert same_bytes(run("none", 0), run("two", 2), ["encoder.safetensors"])
