"""The network's part of a checkpoint is found, however a pretraining framework has packed it; or the parts are named."""

from __future__ import annotations

import argparse
import pathlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.evaluation.evaluate import EvaluateConfig
from ssl_pipeline.evaluation.load_encoder import open_encoder
from ssl_pipeline.models.backbone import BackboneConfig, build_backbone
from ssl_pipeline.models.torchvision_backbones import SmallResNet

State = Mapping[str, Tensor]
Layout = Callable[[State, State], Any]

RGB = ArrayDataset("images", torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def under(prefix: str, state: State) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def head(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.0.weight": torch.randn(8, 32), f"{prefix}.2.weight": torch.randn(4, 8)}


def heads(*prefixes: str) -> dict[str, Tensor]:
    return {name: value for prefix in prefixes for name, value in head(prefix).items()}


def numbered(state: State) -> dict[str, Tensor]:
    """As ``nn.Sequential(*children)`` has it."""
    places = {name: str(place) for place, (name, _) in enumerate(SmallResNet(4).named_children())}
    return {".".join([places[name.partition(".")[0]], name.partition(".")[2]]): value for name, value in state.items()}


def optimizer() -> dict[str, Any]:
    return {"state": {0: {"momentum_buffer": torch.zeros(4, 3, 3, 3), "step": 3}}, "param_groups": [{"lr": 0.1}]}


ARGS = argparse.Namespace(lr=0.1, data=pathlib.PurePosixPath("/data"), milestones=[1, 2])

# What is to be loaded comes first, a second network that also fits second.
LAYOUTS: dict[str, Layout] = {
    "MoCo": lambda a, b: {
        "epoch": 9, "arch": "x", "optimizer": optimizer(),
        "state_dict": {**under("module.encoder_q", a), **head("module.encoder_q.fc"), **under("module.encoder_k", b),
                       **head("module.encoder_k.fc"), "module.queue": torch.zeros(4, 8), "module.queue_ptr": torch.zeros(1)},
    },
    "MoCo v3": lambda a, b: {
        "state_dict": {**under("module.base_encoder", a), **head("module.base_encoder.fc"), **under("module.momentum_encoder", b),
                       **head("module.predictor")},
    },
    "DINO": lambda a, b: {
        "student": {**under("module.backbone", b), **head("module.head.mlp")}, "teacher": {**under("backbone", a), **head("head.mlp")},
        "args": ARGS, "dino_loss": {"center": torch.zeros(1, 4)}, "optimizer": optimizer(),
    },
    "DINOv2": lambda a, _: {"teacher": {**under("backbone", a), **head("dino_head.mlp"), **head("ibot_head.mlp")}},
    "iBOT": lambda a, b: {"student": under("module.backbone", b), "teacher": under("module.backbone", a), "args": ARGS},
    "SwAV": lambda a, _: {**under("module", a), **head("module.projection_head"), "module.prototypes.weight": torch.zeros(5, 4)},
    "BYOL": lambda a, b: {
        **under("net", a), **under("online_encoder.net", a), **head("online_encoder.projector"), **under("target_encoder.net", b),
        **head("online_predictor.net"),
    },
    "BYOL by names": lambda a, b: {"online_network_state_dict": a, "target_network_state_dict": b, "optimizer": optimizer()},
    "SimSiam": lambda a, _: {"state_dict": {**under("module.encoder", a), **head("module.encoder.fc"), **head("module.predictor")}},
    "Barlow Twins": lambda a, _: {"epoch": 1, "model": {**under("module.backbone", a), **head("module.projector"),
                                                        "module.bn.running_mean": torch.zeros(4)}},
    "VICReg": lambda a, _: {"model": {**under("backbone", a), **head("projector")}, "optimizer": optimizer()},
    "solo-learn": lambda a, b: {
        "state_dict": {**under("backbone", a), **head("projector"), **under("momentum_backbone", b), **head("classifier")},
        "hyper_parameters": omegaconf.OmegaConf.create({"lr": 0.1, "data": {"paths": ["/data"], "size": None}}),
    },
    "lightly": lambda a, b: {
        "state_dict": {**under("backbone", numbered(a)), **under("backbone_momentum", numbered(b)), **head("projection_head")},
        "pytorch-lightning_version": "2.5",
    },
    "lightly's DINO": lambda a, b: {"state_dict": {**under("teacher_backbone", a), **under("student_backbone", b)}},
    "VISSL": lambda a, _: {"classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks", a), "heads": head("0")}}}},
    "torch.compile": lambda a, _: under("_orig_mod", a),
    "torch.compile of DDP": lambda a, _: {"model": under("module._orig_mod", a)},
    "torch.compile of a stage": lambda a, _: {name.replace("layer1.", "layer1._orig_mod."): value for name, value in a.items()},
    "FSDP": lambda a, _: {"model": under("_fsdp_wrapped_module", {n.replace("layer2.", "layer2._checkpoint_wrapped_module."): v
                                                                  for n, v in a.items()})},
    "timm's EMA": lambda a, b: {"state_dict": b, "state_dict_ema": a, "arch": "x", "args": ARGS, "metric": np.float64(71.5)},
    "model and its EMA": lambda a, b: {"model": b, "model_ema": {"module": a}, "scaler": {"scale": 1.0}},
    "EMA alone": lambda a, _: {"state_dict_ema": under("module", a)},
    "net": lambda a, _: under("net", a),
    "deeply nested": lambda a, _: {"checkpoint": {"payload": {"weights": OrderedDict(a)}}, "rng": np.random.RandomState(0).get_state()},
    "plain data beside": lambda a, _: {
        "model": a, "args": vars(ARGS), "log": defaultdict(list, loss=[1.0]), "best": np.float32(0.5), "seen": {1, 2},
        "path": pathlib.Path("/data"), "version": torch.__version__, "mean": np.zeros(3),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def networks() -> tuple[SmallResNet, SmallResNet]:
    torch.manual_seed(0)
    return SmallResNet(4), SmallResNet(4)


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.state_dict())


def loaded(path: Path | str, key: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    backbone, notes = build_backbone(BackboneConfig(width=4, weights=str(path), weights_key=key), 3, 32)
    return state_of(backbone.trunk), notes


def same(found: State, wanted: State) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_networks_part_is_found(name: str, networks: tuple[SmallResNet, SmallResNet], tmp_path: Path) -> None:
    first, second = map(state_of, networks)
    torch.save(LAYOUTS[name](first, second), tmp_path / "theirs.pth")
    found, notes = loaded(tmp_path / "theirs.pth")
    assert same(found, first)
    assert len(notes) <= 2


@pytest.mark.parametrize("ending", [".pth", ".pth.tar", ".pt", ".torch", ".bin", ".ckpt", ".safetensors", ".model", ""])
def test_the_ending_does_not_matter(
    ending: str, networks: tuple[SmallResNet, SmallResNet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = map(state_of, networks)
    state = LAYOUTS["MoCo"](first, second)["state_dict"]
    (save_file if ending == ".safetensors" else torch.save)(state, f"theirs{ending}")
    assert same(loaded(f"theirs{ending}")[0], first)
    if ending == ".safetensors":
        Path("renamed.bin").write_bytes(Path("theirs.safetensors").read_bytes())
        assert same(loaded("renamed.bin")[0], first)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("MoCo", "encoder_k"),
        ("MoCo", "state_dict.module.encoder_k"),
        ("MoCo v3", "momentum_encoder"),
        ("DINO", "student"),
        ("timm's EMA", "state_dict"),
        ("BYOL", "target_encoder"),
    ],
)
def test_a_key_chooses_the_other_one(
    name: str, key: str, networks: tuple[SmallResNet, SmallResNet], tmp_path: Path
) -> None:
    first, second = map(state_of, networks)
    torch.save(LAYOUTS[name](first, second), tmp_path / "theirs.pth")
    assert same(loaded(tmp_path / "theirs.pth", key)[0], second)


def test_the_log_says_what_was_taken_and_what_could_be(
    networks: tuple[SmallResNet, SmallResNet], tmp_path: Path
) -> None:
    first, second = map(state_of, networks)
    torch.save(LAYOUTS["MoCo"](first, second), tmp_path / "theirs.pth")
    _, (line, classifier) = loaded(tmp_path / "theirs.pth")
    assert "read from `state_dict.module.encoder_q`" in line
    assert "`state_dict.module.encoder_k` would fit, too (backbone.weights_key=encoder_k)" in line
    assert "2 classifier tensors left out" in classifier


def test_parts_between_which_nothing_tells_are_named(networks: tuple[SmallResNet, SmallResNet], tmp_path: Path) -> None:
    first, second = map(state_of, networks)
    path = tmp_path / "theirs.pth"
    torch.save({"left": first, "right": second}, path)
    with pytest.raises(ConfigError, match=r"several networks that fit: `left`, `right`.*backbone\.weights_key=left"):
        loaded(path)
    assert same(loaded(path, "right")[0], second)
    with pytest.raises(ConfigError, match=r"no network under 'middle'. There is one under `left`, `right`"):
        loaded(path, "middle")
    torch.save({"left": {**first, **head("fc")}, "right": {**first, **head("fc")}}, path)
    assert same(loaded(path)[0], first), "two names for the same tensors are no choice"


def test_what_does_not_fit_is_told_with_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "theirs.pth"
    torch.save({"teacher": under("backbone", timm.create_model("test_vit").state_dict()), "epoch": 1}, path)
    with pytest.raises(
        ConfigError, match=r"It holds .*`teacher\.backbone\.patch_embed` \(2 tensors, proj\.weight: 64×3×16×16\)"
    ):
        loaded(path)


def test_a_key_without_a_file_is_an_error() -> None:
    for weights in (None, "IMAGENET1K_V1"):
        with pytest.raises(ConfigError, match=r"weights_key=teacher` chooses a part of a file"):
            build_backbone(BackboneConfig(name="resnet18", weights=weights, weights_key="teacher"), 3, 32)


@pytest.mark.parametrize("wrapper", ["MAE", "MoCo v3", "DINO"])
def test_a_transformers_part_is_found(wrapper: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0)
    state = state_of(network)
    decoder = {f"decoder_blocks.0.{name}": torch.zeros(3) for name in ("norm1.weight", "attn.qkv.weight")}
    other = {name: value + 1 for name, value in state.items()}
    trees = {
        "MAE": {"model": {**state, **decoder, "mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 5, 8),
                          "decoder_embed.weight": torch.zeros(8, 64), "decoder_pred.bias": torch.zeros(3)}, "args": ARGS},
        "MoCo v3": {"state_dict": {**under("module.base_encoder", state), **head("module.base_encoder.head"),
                                   **under("module.momentum_encoder", other)}},
        "DINO": {"teacher": {**under("backbone", state), "backbone.mask_token": torch.zeros(1, 64)},
                 "student": under("module.backbone", other)},
    }  # fmt: skip
    torch.save(trees[wrapper], tmp_path / "theirs.pth")
    config = BackboneConfig(name="timm/test_vit", weights=str(tmp_path / "theirs.pth"))
    backbone, notes = build_backbone(config, 3, 160)
    assert same(state_of(backbone.trunk), state)
    assert any("left out" in note for note in notes)


def test_objects_that_would_run_are_named_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "theirs.pth"
    torch.save({"model": SmallResNet(4)}, path)  # a pickled network, which is code
    with pytest.raises(
        ConfigError, match=r"it also holds .*ssl_pipeline\.models\.torchvision_backbones.*no code is ever run"
    ):
        loaded(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html>", "web page"),
        (b"", "can't be read as weights"),
    ],
)
def test_what_stands_in_the_place_of_a_checkpoint_is_told(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "theirs.pth"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        loaded(path)


def test_evaluate_finds_it_by_the_same_function(networks: tuple[SmallResNet, SmallResNet], tmp_path: Path) -> None:
    first, second = map(state_of, networks)
    path = tmp_path / "theirs.pth.tar"
    torch.save(LAYOUTS["DINO"](first, second), path)
    words = [f"encoder={path}", "backbone.width=4", "size=32"]
    for key, wanted in (("null", first), ("student", second)):
        config = load("evaluate", EvaluateConfig, [*words, f"backbone.weights_key={key}"])
        assert same(state_of(open_encoder(config, RGB).encoder.backbone.trunk), wanted)
