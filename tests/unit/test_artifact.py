from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import Card, Encoder, EncoderSpec, load_encoder, read, save
from ssl_pipeline.models.neck import NeckConfig


def blueprint(
    name: str = "small_resnet", neck: str = "gap", channels: int = 3, weights: str | None = None
) -> EncoderSpec:
    return EncoderSpec(
        backbone=BackboneConfig(name=name, width=4, weights=weights),
        neck=NeckConfig.model_validate({"name": neck}),
        channels=channels,
        size=32,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )


def card(plan: EncoderSpec) -> Card:
    return Card(kind="encoder", blueprint=plan, config={}, data={}, figures={"knn": 0.5}, versions={})


def written(folder: Path, plan: EncoderSpec | None = None) -> Encoder:
    plan = plan or blueprint()
    encoder, _ = plan.build()
    save(folder, encoder, card(plan))
    return encoder


def test_a_card_is_written_whatever_was_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = blueprint()
    figures = {"eval/knn": 0.5, "eval/of_one_image": math.nan, "eval/huge": math.inf}
    found = Card(kind="encoder", blueprint=plan, config={}, data={}, figures=figures, versions={})
    save(tmp_path, plan.build()[0], found)
    text = (tmp_path / "card.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["figures"] == {
        "eval/knn": 0.5
    }
    assert load_encoder(tmp_path)[1].figures == {"eval/knn": 0.5}
    assert "eval/of_one_image is not a finite number" in caplog.text


@pytest.mark.parametrize(
    ("name", "neck", "channels"),
    [
        ("small_resnet", "gap", 3),
        ("small_resnet", "gem", 1),
        ("resnet18", "multi_level", 3),
        pytest.param("convnext_tiny", "gap", 3, marks=pytest.mark.slow),
    ],
)
def test_round_trip_bit_for_bit(name: str, neck: str, channels: int, tmp_path: Path) -> None:
    encoder = written(tmp_path, blueprint(name, neck, channels)).eval()
    image = torch.rand(2, channels, 32, 32)
    for path in (tmp_path, tmp_path / "encoder.safetensors"):
        again, found = load_encoder(path)
        ours, theirs = encoder.state_dict(), again.state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        with torch.no_grad():
            assert torch.equal(encoder(image), again.eval()(image))
        assert found.figures == {"knn": 0.5}
        assert found.created
    assert sorted(p.name for p in tmp_path.iterdir()) == ["card.json", "encoder.safetensors"]


def test_the_trunk_loads_into_torchvision_by_stripping_a_prefix(tmp_path: Path) -> None:
    plan = blueprint("resnet18")
    written(tmp_path, plan.model_copy(update={"size": 96}))
    prefix = "backbone.trunk."
    state = load_file(tmp_path / "encoder.safetensors")
    theirs = models.resnet18()
    theirs.fc = nn.Identity()
    theirs.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()})
    ours, _ = load_encoder(tmp_path)
    image = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(image), ours.eval()(image))


def test_channels_last_and_shared_tensors(tmp_path: Path) -> None:
    plan = blueprint()
    encoder, _ = plan.build()
    encoder.to(memory_format=torch.channels_last)
    encoder.backbone.trunk.get_submodule("bn1").weight = encoder.backbone.trunk.get_submodule("bn1").bias
    save(tmp_path, encoder, card(plan))
    again, _ = load_encoder(tmp_path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in encoder.state_dict().items())


def test_weights_are_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    plan = blueprint("resnet18", weights="IMAGENET1K_V1")
    encoder, _ = plan.without_weights().build()
    assert encoder.strides["c5"] == 32, "the stem that the weights had, though the images are small"
    save(tmp_path, encoder, card(plan))
    again, _ = load_encoder(tmp_path)
    assert again.strides == encoder.strides


@pytest.mark.parametrize("stem", ["auto", "small", "imagenet"])
def test_a_file_as_start_does_not_change_the_stem_of_the_rebuilt(stem: str, tmp_path: Path) -> None:
    """Both of small_resnet's stems have kernels of one shape: the wrong one would load without a word."""
    start = tmp_path / "start.safetensors"
    config = BackboneConfig.model_validate({"width": 4, "stem": stem})
    plan = blueprint().model_copy(update={"backbone": config})
    save_file(plan.build()[0].backbone.trunk.state_dict(), start)
    plan = plan.model_copy(update={"backbone": config.model_copy(update={"weights": str(start)})})
    encoder, _ = plan.build()
    assert plan.without_weights().build()[0].strides == encoder.strides
    save(tmp_path, encoder, card(plan))
    assert load_encoder(tmp_path)[0].strides == encoder.strides


def test_another_architecture_is_refused_by_its_keys(tmp_path: Path) -> None:
    plan = blueprint()
    encoder, _ = plan.build()
    save(tmp_path, encoder, card(blueprint("resnet18")))
    with pytest.raises(
        ConfigError, match=r"another architecture: .*missing \(backbone\.trunk\.layer1\.1\.conv1\.weight"
    ):
        load_encoder(tmp_path)
    state = dict(encoder.state_dict())
    state["extra"] = state.pop("backbone.trunk.conv1.weight")
    save(tmp_path, encoder, card(plan))
    save_file(state, tmp_path / "encoder.safetensors")
    message = r"1 key missing \(backbone\.trunk\.conv1\.weight\); 1 key unknown \(extra\)"
    with pytest.raises(ConfigError, match=message):
        load_encoder(tmp_path)


def test_what_is_not_there_or_not_whole(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            load_encoder(path)

    refused(tmp_path / "nowhere", "there is no")
    refused(tmp_path, "holds no encoder.safetensors")
    written(tmp_path)
    other = tmp_path / "other.safetensors"
    other.write_bytes((tmp_path / "encoder.safetensors").read_bytes())
    refused(other, "is not named encoder.safetensors")

    weights, notes = tmp_path / "encoder.safetensors", tmp_path / "card.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "is damaged")
    weights.write_bytes(whole)

    text = notes.read_text()
    notes.write_text(text[:40])
    refused(tmp_path, r"card\.json is damaged")
    notes.write_text(json.dumps({"schema_version": 99, "what": "from the future"}))
    refused(tmp_path, "is of schema 99, and this version reads schema 1")
    notes.write_text(json.dumps({**json.loads(text), "surprise": 1}))
    refused(tmp_path, "can't be read by this version .*surprise")
    notes.unlink()
    refused(tmp_path, r"holds no card\.json")


def test_the_kind_is_checked(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "encoder.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"describes an? encoder, and a model is needed"):
        read(tmp_path, "model")
