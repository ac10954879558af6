from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.models.backbone import Backbone, BackboneConfig, build_backbone
from ssl_pipeline.models.bottleneck import BottleneckConfig, build_bottleneck
from ssl_pipeline.models.dense_heads import DeepLab, SkipHead
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.models.heads import CosineHead, LinearHead
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.models.projection_heads import prediction_head, projection_head
from ssl_pipeline.models.torchvision_backbones import SmallResNet, feature_info, remove_classifier
from ssl_pipeline.models.weights import load_strictly

SIZE = 64
FAST = {"resnet18": "fc", "mobilenet_v3_small": "classifier"}  # where the library's classifier is
SLOW = {
    "resnext50_32x4d": "fc",
    "wide_resnet50_2": "fc",
    "convnext_tiny": "classifier.2",
    "swin_t": "head",
    "swin_v2_t": "head",
    "efficientnet_b0": "classifier",
    "efficientnet_v2_s": "classifier",
    "mobilenet_v2": "classifier",
}
PYRAMIDS = [*FAST, *SLOW, "vgg11", "vgg11_bn"]


def cut(model: nn.Module, name: str) -> nn.Module:
    owner, _, child = name.rpartition(".")
    setattr(model.get_submodule(owner), child, nn.Identity())
    return model.eval()


def images(count: int = 2, channels: int = 3, size: int = SIZE) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def shake(model: nn.Module) -> nn.Module:
    """Every weight and statistic apart from its initial value, so that none can be confounded with another's."""
    generator = torch.Generator().manual_seed(1)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value += 0.02 * (torch.rand(value.shape, generator=generator) - 0.5)
    return model


def encoder_of(name: str, channels: int = 3, size: int = SIZE, neck: str = "gap", **more: Any) -> Encoder:
    config = BackboneConfig(name=name, **{"stem": "imagenet", **more})
    backbone, _ = build_backbone(config, channels, size)
    return Encoder(backbone, NeckConfig.model_validate({"name": neck})).eval()


def check_declared(config: BackboneConfig, size: int = SIZE) -> Backbone:
    """On the meta device: shapes are followed, nothing is computed."""
    with torch.device("meta"), torch.no_grad():
        backbone, _ = build_backbone(config, 3, size)
        maps = backbone.eval()(torch.empty(2, 3, size, size))
    assert list(backbone.widths) == list(backbone.strides) == [level for level in maps if level != "token"]
    for level, width in backbone.widths.items():
        side = size // backbone.strides[level]
        assert maps[level].shape == (2, width, side, side), level
    assert ("token" in maps) == backbone.has_token
    return backbone


@pytest.mark.parametrize("name", [*PYRAMIDS, "vit_b_32"])
def test_widths_and_strides_are_those_of_the_maps(name: str) -> None:
    check_declared(BackboneConfig(name=name, stem="imagenet"))


@pytest.mark.parametrize("name", ["small_resnet", "resnet18", "efficientnet_b0", "mobilenet_v2", "mobilenet_v3_small"])
def test_the_small_stem_is_declared_too(name: str) -> None:
    backbone = check_declared(BackboneConfig(name=name), 32)
    with torch.device("meta"):
        _, notes = build_backbone(BackboneConfig(name=name), 3, 32)
    assert backbone.strides["c5"] == (16 if "net_" in name and name != "small_resnet" else 8)
    assert any("small stem" in note for note in notes) == (name != "small_resnet")


def test_nothing_is_computed_to_build_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's are tried out, but only shapes are followed."""
    right, devices = nn.Module.__call__, set[str]()

    def watched(module: nn.Module, *words: Any, **named: Any) -> Any:
        devices.update(word.device.type for word in words if isinstance(word, Tensor))
        return right(module, *words, **named)

    monkeypatch.setattr(nn.Module, "__call__", watched)
    for name in ("resnet18", "mobilenet_v3_small"):
        build_backbone(BackboneConfig(name=name), 3, SIZE)
        assert not devices
    state = torch.get_rng_state()
    build_backbone(BackboneConfig(name="timm/test_resnet"), 3, SIZE)
    assert devices == {"meta"}
    torch.set_rng_state(state)
    trunk: Any = timm.create_model("test_resnet", num_classes=0)
    assert torch.equal(trunk.conv1[0].weight, build_again(state).conv1[0].weight)


def build_again(state: Tensor) -> Any:
    torch.set_rng_state(state)
    return build_backbone(BackboneConfig(name="timm/test_resnet"), 3, SIZE)[0].trunk


@pytest.mark.parametrize(
    "name",
    ["resnet18", "convnext_tiny", "swin_t", "vit_b_32", "timm/fasternet_t0", "timm/test_vit2", "timm/test_convnext"],
)
def test_what_learns_has_a_gradient_whatever_the_neck(name: str) -> None:
    """Several processes wait at their second step for a gradient that does not come."""
    with torch.device("meta"):
        backbone, _ = build_backbone(BackboneConfig(name=name), 3, SIZE)
    for neck in ("gap", "gem", "multi_level", "maps", *(["tokens"] if backbone.has_token else [])):
        with torch.device("meta"):
            encoder = Encoder(backbone, NeckConfig.model_validate({"name": "gem" if neck == "maps" else neck}))
            encoder.learn(maps=neck == "maps")
            encoder.zero_grad()
            given = torch.empty(2, 3, SIZE, SIZE)
            results = encoder.feature_maps(given).values() if neck == "maps" else [encoder(given)]
            torch.stack([result.sum() for result in results]).sum().backward()
        idle = {key for key, parameter in encoder.named_parameters() if parameter.grad is None}
        assert idle == {key for key, parameter in encoder.named_parameters() if not parameter.requires_grad}, neck
        assert len(idle) <= 4


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_features_and_keys_are_the_librarys_own(name: str) -> None:
    theirs = cut(shake(models.get_model(name)), {**FAST, **SLOW}[name])
    ours = encoder_of(name)
    prefix = "backbone.trunk."
    assert all(key.startswith(prefix) for key in ours.state_dict())
    assert {key.removeprefix(prefix) for key in ours.state_dict()} == set(theirs.state_dict())
    load_strictly(ours, {prefix + key: value for key, value in theirs.state_dict().items()}, "the test")
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-4, atol=1e-5)


def tiny_vit(size: int) -> models.VisionTransformer:
    return models.VisionTransformer(size, 32, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)


def tiny_convnext() -> nn.Module:
    widths = (4, 8, 12, 16)
    model: nn.Module = models.ConvNeXt(
        [CNBlockConfig(w, n, 1) for w, n in zip(widths, (*widths[1:], None), strict=True)]
    )
    return model


def tiny_swin() -> nn.Module:
    model: nn.Module = models.SwinTransformer([4, 4], 8, [1, 1, 1, 1], [1, 1, 2, 2], [7, 7])
    return model


@pytest.mark.parametrize(
    ("make", "classifier", "neck"),
    [
        (tiny_convnext, "classifier.2", "gap"),
        (tiny_swin, "head", "gap"),
        (lambda: tiny_vit(SIZE), "heads", "tokens"),
    ],
    ids=["convnext", "swin", "vit"],
)
def test_small_kin_of_large_families(
    make: Callable[[], nn.Module], classifier: str, neck: Literal["gap", "tokens"]
) -> None:
    theirs = shake(make()).eval()
    trunk = copy.deepcopy(theirs)
    anatomy = feature_info(trunk, "kin")
    remove_classifier(trunk, anatomy)
    ours = Encoder(Backbone(trunk, anatomy), NeckConfig(name=neck)).eval()
    assert ours.backbone.fixed_input == (SIZE if neck == "tokens" else None)
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), cut(theirs, classifier)(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_vgg_is_the_pooled_features_of_the_librarys() -> None:
    theirs = models.vgg11().eval()
    ours = encoder_of("vgg11")
    load_strictly(ours.backbone.trunk, {k: v for k, v in theirs.state_dict().items() if "classifier" not in k}, "test")
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), theirs.features(images()).mean((2, 3)))


# Timm


@pytest.mark.parametrize("name", ["pvt_v2_b0", "xcit_nano_12_p8_224"])
def test_patches_that_overlap_fit_an_image_of_any_size(name: str) -> None:
    check_declared(BackboneConfig(name=f"timm/{name}"))


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_timm_trunks(name: str) -> None:
    timm = pytest.importorskip("timm")
    backbone = check_declared(BackboneConfig(name=f"timm/{name}"))
    with torch.device("meta"):
        assert backbone.widths["c5"] == timm.create_model(name, num_classes=0).num_features
    assert len(backbone.widths) == (1 if backbone.has_token else 4)
    assert backbone.fixed_input == (SIZE if backbone.has_token else None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "regnetx_002", "efficientnet_lite0"])
def test_more_timm_trunks(name: str) -> None:
    pytest.importorskip("timm")
    check_declared(BackboneConfig(name=f"timm/{name}"), 224)


@pytest.mark.parametrize(
    ("name", "neck"),
    [
        ("test_resnet", "gap"),
        ("test_convnext", "gap"),
        ("test_efficientnet", "gap"),
        ("test_vit", "tokens"),
        ("test_vit2", "gap"),
        ("test_vit4", "gap"),
    ],
)
def test_timm_features_are_its_own(name: str, neck: str) -> None:
    pytest.importorskip("timm")
    ours = encoder_of(name, neck=neck)  # without the prefix: torchvision has none of that name
    shake(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), ours.backbone.trunk(images()), rtol=1e-4, atol=1e-5)


def test_timm_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for name in ("timm/resnet10t", "resnet10t"):
        with pytest.raises(ConfigError, match=r"pip install -e '\.\[timm\]'"):
            build_backbone(BackboneConfig(name=name), 3, SIZE)


# Names, stems, sizes


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        ({"name": "resnet81"}, SIZE, r"has 'resnet81'\..*nearest: resnet18"),
        ({"name": "timm/resnet10tt"}, SIZE, "timm has no 'resnet10tt'.*resnet10t"),
        ({"name": "fasterrcnn_resnet50_fpn"}, SIZE, "neither torchvision nor timm has 'fasterrcnn_resnet50_fpn'"),
        ({"name": "squeezenet1_1"}, SIZE, "squeezenet1_1 is of a torchvision family without feature maps"),
        ({"name": "convnext_tiny", "stem": "small"}, SIZE, "convnext_tiny has no small stem; ResNets, VGGs"),
        ({"name": "timm/resnet10t", "stem": "small"}, SIZE, "is for torchvision's"),
        ({"name": "resnet18", "stem": "small", "weights": "DEFAULT"}, SIZE, "official weights have the ImageNet stem"),
        ({"name": "vit_b_32"}, 72, "72 px is no multiple of vit_b_32's patches of 32 px: take 64"),
        ({"name": "timm/vit_tiny_patch16_224"}, 72, "72 px is no multiple"),
        (
            {"name": "timm/crossvit_tiny_240"},
            SIZE,
            "crossvit_tiny_240 gives no feature maps of images of 64 px .* own size is 240",
        ),
        ({"name": "small_resnet", "weights": "DEFAULT"}, SIZE, "small_resnet has no official weights"),
    ],
)
def test_mistakes_are_told(config: dict[str, str], size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(BackboneConfig.model_validate(config), 3, size)


def test_unknown_keys_and_stems_are_refused() -> None:
    with pytest.raises(ValidationError):
        BackboneConfig.model_validate({"name": "resnet18", "depth": 3})
    with pytest.raises(ValidationError):
        BackboneConfig.model_validate({"stem": "tiny"})


def test_small_resnet_width() -> None:
    backbone, _ = build_backbone(BackboneConfig(width=4), 1, 32)
    assert list(backbone.widths.values()) == [4, 8, 16, 32]
    assert list(backbone.strides.values()) == [1, 2, 4, 8]


# Neck, bottleneck, heads


def test_narrow_strided_shortcuts_learn_alike_in_either_layout() -> None:
    """oneDNN's kernel for these has too little room below 8 channels without AVX-512: uxlfoundation/oneDNN#6035."""
    plain = SmallResNet(4)
    images = torch.randn(64, 3, 12, 12)
    narrow = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    for network, batch in ((plain, images), (narrow, images.contiguous(memory_format=torch.channels_last))):
        network(batch).square().sum().backward()
    for (name, expected), found in zip(plain.named_parameters(), narrow.parameters(), strict=True):
        assert expected.grad is not None
        assert found.grad is not None
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_necks() -> None:
    encoder = encoder_of("small_resnet")
    maps = encoder.feature_maps(images())
    torch.testing.assert_close(encoder(images()), maps["c5"].mean((2, 3)))
    many = encoder_of("small_resnet", neck="multi_level")
    assert many.width == sum(many.widths.values()) == many(images()).shape[1]
    gem = encoder_of("small_resnet", neck="gem")
    load_strictly(gem.backbone, encoder.backbone.state_dict(), "the test")
    expected = maps["c5"].clamp_min(1e-6).pow(3).mean((2, 3)).pow(1 / 3)
    torch.testing.assert_close(gem(images()), expected)
    gem(images()).sum().backward()
    assert gem.neck.power.grad is not None
    with pytest.raises(ConfigError, match=r"neck\.name=tokens.*no class token"):
        encoder_of("small_resnet", neck="tokens")


def test_vit_maps_have_no_token() -> None:
    with torch.device("meta"), torch.no_grad():
        encoder = encoder_of("vit_b_32")
        assert list(encoder.feature_maps(torch.empty(2, 3, SIZE, SIZE))) == ["c5"]
        assert encoder(torch.empty(2, 3, SIZE, SIZE)).shape == (2, encoder.width)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_bottleneck(norm: str, activation: str) -> None:
    config = BottleneckConfig.model_validate({"width": 8, "norm": norm, "activation": activation})
    module, width = build_bottleneck(config, 32)
    assert module(torch.randn(4, 32)).shape == (4, width) == (4, 8)
    assert len(list(module.children())) == 1 + (norm != "none") + (activation != "none")
    rows = torch.randn(4, 32)
    off, width = build_bottleneck(BottleneckConfig(), 32)
    assert width == 32
    assert torch.equal(off(rows), rows)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("final_norm", [False, True])
def test_projection_head(layers: int, final_norm: bool) -> None:
    head = projection_head(12, 16, 8, layers, final_norm=final_norm)
    assert head(torch.randn(4, 12)).shape == (4, 8)
    kinds = [type(m) for m in head.modules()]
    assert kinds.count(nn.Linear) == layers
    assert kinds.count(nn.ReLU) == layers - 1
    assert kinds.count(nn.BatchNorm1d) == layers - 1 + final_norm


def test_other_heads() -> None:
    assert prediction_head(8, 4)(torch.randn(4, 8)).shape == (4, 8)
    linear = LinearHead(512, 10)
    assert float(linear.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert not linear.bias.any()
    cosine = CosineHead(8, 3, temperature=0.1)
    rows = torch.randn(4, 8)
    expected = nn.functional.cosine_similarity(rows[:, None], cosine.weight[None], dim=2) / 0.1
    torch.testing.assert_close(cosine(rows), expected)
    torch.testing.assert_close(cosine(7 * rows), expected)


@pytest.mark.parametrize("head", [SkipHead, DeepLab])
def test_dense_heads_learn_in_all_their_parts(head: type[SkipHead | DeepLab]) -> None:
    widths = {"c4": 4, "c5": 8}
    made = head(widths, 3)
    scores = made({"c4": torch.randn(2, 4, 6, 10), "c5": torch.randn(2, 8, 3, 5)})
    assert scores.shape == ((2, 3, 6, 10) if head is SkipHead else (2, 3, 3, 5))
    scores.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
