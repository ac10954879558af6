"""Checkpoints of others: the features are those of the network that was saved, whatever its tensors are called there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.evaluation.evaluate import EvaluateConfig
from ssl_pipeline.evaluation.load_encoder import LoadedEncoder, describe_encoder, open_encoder

Names = Callable[[models.ResNet], dict[str, Tensor]]

RGB = ArrayDataset("images", torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def lightlys_sequence(network: models.ResNet) -> nn.Module:
    return nn.Sequential(*list(network.children())[:-1])


def beside_a_head(network: models.ResNet) -> dict[str, Tensor]:
    module = nn.Module()
    module.backbone = lightlys_sequence(network)
    module.projection_head = nn.Linear(512, 8)
    return module.state_dict()


def in_our_artifact(network: models.ResNet) -> dict[str, Tensor]:
    trunk = {f"backbone.trunk.{k}": v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    return {**trunk, "neck.power": torch.ones(1)}


SAVED: dict[str, Names] = {
    "torchvision": lambda network: network.state_dict(),
    "of a sequence": lambda network: lightlys_sequence(network).state_dict(),
    "of a Lightning module": beside_a_head,
    "of an encoder of ours": in_our_artifact,
    "of a wrapped model": lambda network: {f"_model.backbone.{k}": v for k, v in network.state_dict().items()},
}


def opened(encoder: Path | str | None, *overrides: str) -> LoadedEncoder:
    words = [] if encoder is None else describe_encoder([str(encoder)], ["encoder"])
    return open_encoder(load("evaluate", EvaluateConfig, [*words, "size=64", *overrides]), RGB)


@pytest.mark.parametrize("names", SAVED)
def test_features_are_the_saved_networks(names: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = models.resnet18().eval()
    torch.save({"state_dict": SAVED[names](network)}, tmp_path / "theirs.ckpt")
    ours = opened(tmp_path / "theirs.ckpt", "backbone.name=resnet18")
    network.fc = nn.Identity()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.encoder(images), network(images))
    assert any("left out" in note for note in ours.notes) == (names != "of a sequence")


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    state = models.resnet18().state_dict()
    path = tmp_path / "theirs.safetensors"
    save_file({**state, "surprise": torch.ones(1)}, path)
    with pytest.raises(ConfigError, match=r"1 key unknown \(surprise\)"):
        opened(path, "backbone.name=resnet18")
    with pytest.raises(ConfigError, match=r"say of which network by `backbone\.name"):
        opened(path)
    with pytest.raises(ConfigError, match="another architecture"):
        opened(path, "backbone.name=resnet34")
    with pytest.raises(ConfigError, match="there is no file"):
        opened(tmp_path / "nowhere.pth", "backbone.name=resnet18")
    with pytest.raises(ConfigError, match="there is no"):
        opened(tmp_path / "nowhere")
    for name in ("timm/vit_small_patch16_224", "resnet50"):
        with pytest.raises(ConfigError, match=rf"backbone\.name={name} backbone\.weights=DEFAULT"):
            opened(name)
    with pytest.raises(ConfigError, match="no multiple of vit_b_16's patches"):
        opened(None, "backbone.name=vit_b_16", "size=60")


def test_leading_words_are_quoted(tmp_path: Path) -> None:
    assert describe_encoder(["data=folder", "x"], ["encoder"]) == ["data=folder", "x"]
    assert describe_encoder(["--help"], ["encoder"]) == ["--help"]
    words = describe_encoder(["a run, of 'mine' (1)", "photo=1", "size=32"], ["encoder", "image"])
    assert words == ["encoder=\"a run, of 'mine' (1)\"", "photo=1", "size=32"]
    assert load("evaluate", EvaluateConfig, [words[0]]).encoder == "a run, of 'mine' (1)"
