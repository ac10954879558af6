from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.models.backbone import BackboneConfig, build_backbone
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.models.torchvision_backbones import SmallResNet
from ssl_pipeline.models.weights import load_trunk
from tests.unit.test_model import SIZE, encoder_of, images, shake, tiny_vit


def _saved(folder: Path, state: dict[str, Tensor], form: str) -> Path:
    path = folder / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(state, path)
        return path
    forms: dict[str, Callable[[], Any]] = {
        "plain": lambda: state,
        "state_dict": lambda: {"state_dict": state, "epoch": 3},
        "model": lambda: {"model": state},
        "module": lambda: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    }
    torch.save(forms[form](), path)
    return path


def built(config: BackboneConfig, channels: int) -> tuple[Encoder, list[str]]:
    backbone, notes = build_backbone(config, channels, SIZE)
    return Encoder(backbone, NeckConfig()), notes


@pytest.mark.parametrize("form", ["plain", "state_dict", "model", "module", "safetensors"])
def test_a_file_of_the_librarys_gives_its_features(form: str, tmp_path: Path) -> None:
    theirs = shake(SmallResNet()).eval()
    state = {**theirs.state_dict(), "fc.weight": torch.zeros(10, 128), "fc.bias": torch.zeros(10)}
    path = _saved(tmp_path, state, form)
    encoder, notes = built(BackboneConfig(weights=str(path)), 3)
    assert any("2 classifier tensors left out" in note for note in notes)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(images()), theirs(images()))


def test_what_older_releases_published_loads(tmp_path: Path) -> None:
    """Batch norms without counters; transformers whose MLPs' layers had other names, made for another image size."""
    state = models.resnet18().state_dict()
    path = _saved(tmp_path, {k: v for k, v in state.items() if "num_batches" not in k}, "plain")
    build_backbone(BackboneConfig(name="resnet18", weights=str(path)), 3, SIZE)
    state = shake(tiny_vit(96)).state_dict()
    older = {k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v for k, v in state.items()}
    trunk = tiny_vit(SIZE)
    trunk.heads = nn.Sequential()
    notes = load_trunk(trunk, older, ("heads.",), "the file")
    assert any("interpolated to 64 px" in note for note in notes)
    own = trunk.state_dict()
    assert own["encoder.pos_embedding"].shape[1] == 1 + 4
    key = "encoder.layers.encoder_layer_0.mlp.3.weight"
    assert torch.equal(own[key], state[key])
    older["encoder.layers.encoder_layer_0.mlp.linear_1.bias"] = torch.zeros(5)
    with pytest.raises(ConfigError, match="the file is of another architecture"):
        load_trunk(trunk, older, ("heads.",), "the file")


@pytest.mark.parametrize("name", ["small_resnet", "mobilenet_v3_small", "timm/test_resnet"])
@pytest.mark.parametrize("channels", [1, 5])
def test_a_grayscale_image_gives_what_its_rgb_form_gives(name: str, channels: int, tmp_path: Path) -> None:
    rgb = shake(encoder_of(name, stem="auto" if name == "small_resnet" else "imagenet"))
    assert isinstance(rgb, Encoder)
    path = _saved(tmp_path, rgb.backbone.trunk.state_dict(), "plain")
    config = BackboneConfig(name=name, weights=str(path))
    other, notes = built(config, channels)
    assert any("summed" in note for note in notes)
    grayscale = images(channels=1)
    with torch.no_grad():
        torch.testing.assert_close(
            other.eval()(grayscale.expand(-1, channels, -1, -1)),
            rgb(grayscale.expand(-1, 3, -1, -1)),
            rtol=1e-3,
            atol=1e-4,
        )


def test_a_file_of_a_grayscale_trunk_is_taken_as_it_is(tmp_path: Path) -> None:
    grayscale = encoder_of("resnet18", channels=1)
    path = _saved(tmp_path, grayscale.backbone.trunk.state_dict(), "plain")
    again, notes = built(BackboneConfig(name="resnet18", weights=str(path)), 1)
    assert not any("summed" in note for note in notes)
    with torch.no_grad():
        assert torch.equal(again.eval()(images(channels=1)), grayscale(images(channels=1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer4.1.conv2.weight"), r"1 key missing \(layer4\.1\.conv2\.weight\)"),
        (lambda s: s.update({"layer9.weight": torch.zeros(1)}), r"1 key unknown \(layer9\.weight\)"),
        (lambda s: s.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}), r"1 key of another shape \(conv1\.weight\)"),
    ],
)
def test_every_key_is_accounted_for(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    state = dict(models.resnet18().state_dict())
    change(state)
    path = _saved(tmp_path, state, "plain")
    with pytest.raises(ConfigError, match=message):
        build_backbone(BackboneConfig(name="resnet18", weights=str(path)), 3, SIZE)


def test_another_architecture_is_named_with_a_count(tmp_path: Path) -> None:
    path = _saved(tmp_path, models.mobilenet_v3_small().state_dict(), "plain")
    with pytest.raises(
        ConfigError, match=r"w\.pth is of another architecture: \d+ keys missing \(conv1\.weight, .*, …\)"
    ):
        build_backbone(BackboneConfig(name="resnet18", weights=str(path)), 3, SIZE)


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            build_backbone(BackboneConfig(name="resnet18", weights=str(path)), 3, SIZE)

    refused(tmp_path / "none.pth", "there is no file")
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(b"not weights at all")
        refused(tmp_path / name, "can't be read as weights|is damaged")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "b.pth")
    refused(tmp_path / "b.pth", "holds no state dict")


def test_official_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no official weights 'IMAGENET9'. Known: IMAGENET1K_V1"):
        build_backbone(BackboneConfig(name="resnet18", weights="IMAGENET9"), 3, SIZE)

    state = models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    backbone, notes = build_backbone(BackboneConfig(name="resnet18", weights="DEFAULT"), 3, 32)
    assert backbone.strides["c5"] == 32, "weights bring the stem that they were made with"
    assert torch.equal(backbone.trunk.state_dict()["conv1.weight"], state["conv1.weight"])
    assert len(notes) == 1

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ConfigError, match=r"can't be downloaded \(no network\).*backbone\.weights=FILE"):
        build_backbone(BackboneConfig(name="resnet18", weights="DEFAULT"), 3, SIZE)
