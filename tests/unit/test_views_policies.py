"""Which views there are: changes of the second, multi-crop, the policies of the papers, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from ssl_pipeline.config.base import ConfigError, dump
from ssl_pipeline.config.command import load
from ssl_pipeline.evaluation.plot_views import PictureConfig, columns_of, draw
from ssl_pipeline.models.backbone import BackboneConfig, build_backbone
from ssl_pipeline.pretrain import pretrain
from ssl_pipeline.pretrain_config import PretrainConfig
from ssl_pipeline.transforms.config import BlurConfig, ViewConfig, ViewsConfig
from ssl_pipeline.transforms.multi_view import Views
from tests.runs import tiny_pretrain

SEED = torch.Generator().manual_seed(0)


def full(config: ViewsConfig, channels: int = 3) -> ViewsConfig:
    return config.for_channels(channels)[0]


def test_views_differ_as_they_are_told_and_inherit_the_rest() -> None:
    config = ViewsConfig.model_validate(
        {
            "num_views": 3,
            "gaussian_blur": {"probability": 1.0, "sigma": [0.5, 1.5]},
            "second_view": {
                "gaussian_blur": {"probability": 0.1},
                "solarize": 0.2,
                "color_jitter": {"brightness": 0.2},
            },
            "local_views": {"count": 2, "size": 16},
        }
    )
    first, second, third, local, last = full(config).each()
    assert config.total == 5
    assert (first.gaussian_blur.probability, first.solarize, first.size) == (1.0, 0.0, 32)
    assert (second.gaussian_blur, second.solarize) == (BlurConfig(probability=0.1, sigma=(0.5, 1.5)), 0.2)
    assert second.color_jitter.hue == pytest.approx(0.05)  # settled from its own brightness
    assert second == third
    assert (local.size, local.crop.scale, local.crop.ratio) == (16, (0.05, 0.14), first.crop.ratio)
    assert local == last
    assert local.gaussian_blur == first.gaussian_blur
    assert ViewsConfig.model_validate(dump(config)) == config
    assert full(ViewsConfig.model_validate(dump(config))).each() == full(config).each()


def test_changes_of_a_second_view_that_is_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="second_view=null"):
        ViewsConfig.model_validate({"num_views": 1, "second_view": {"solarize": 0.2}})


def test_changed_views_obey_the_channels_by_name() -> None:
    for key, count in (("second_view", {}), ("local_views", {"count": 1})):
        config = ViewsConfig.model_validate({key: {"color_jitter": {"hue": 0.1}, **count}})
        with pytest.raises(ConfigError, match=rf"transform\.{key}\.color_jitter\.hue"):
            config.for_channels(1)


def test_multi_crop_leaves_the_global_views_as_they_were() -> None:
    """Views are numbered, and the number is in the draw's name: a further view never moves the others."""
    pixels = (torch.rand(4, 3, 40, 40, generator=SEED) * 255).to(torch.uint8)
    index = torch.arange(4)
    plain = Views(full(ViewsConfig(size=24)), (0.0,) * 3, (1.0,) * 3, seed=3)
    config = ViewsConfig.model_validate({"size": 24, "local_views": {"count": 3, "size": 12}})
    multi = Views(full(config), (0.0,) * 3, (1.0,) * 3, seed=3)
    expected = plain.finish(plain.of_pixels(pixels, index, 0), index, 0)
    found = multi.finish(multi.of_pixels(pixels, index, 0), index, 0)
    assert [view.shape[-1] for view in found] == [24, 24, 12, 12, 12]
    for ours, theirs in zip(found, expected, strict=False):
        assert torch.equal(ours, theirs)
    files = multi.of_files([Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels], index, 0)
    assert [view.shape[-1] for view in files] == [24, 24, 12, 12, 12]
    assert not torch.equal(found[2], found[3])


def test_local_views_are_refused_where_they_do_not_go() -> None:
    local = ["transform.local_views.count=2", "transform.local_views.size=8"]
    with pytest.raises(ConfigError, match=r"`transform\.local_views\.count` is 2, and simclr takes no local views"):
        pretrain(tiny_pretrain(None, *local))
    for name, size in (("vit_b_32", 32), ("small_resnet", 12)):
        config = tiny_pretrain(None, *local, f"backbone.name={name}")
        backbone, _ = build_backbone(BackboneConfig(name=name, width=4), 3, size)
        if name == "small_resnet":
            config.check_local_views(backbone)
        else:
            with pytest.raises(
                ConfigError, match=r"`transform\.local_views` needs a backbone that takes images of any size"
            ):
                config.check_local_views(backbone)


def test_second_view_by_override() -> None:
    views = tiny_pretrain(
        None, "transform.second_view.gaussian_blur.probability=0.1", "transform.second_view.solarize=0.2"
    ).transform
    assert views.each()[1].gaussian_blur.probability == 0.1


def test_policies_are_the_papers() -> None:
    def policy(name: str) -> list[ViewConfig]:
        return full(load("pretrain", PretrainConfig, [f"transform={name}"]).transform).each()

    assert [view.color_jitter.hue for view in policy("simclr")] == [0.2, 0.2]
    assert [(view.gaussian_blur.probability, view.solarize) for view in policy("byol")] == [(1.0, 0.0), (0.1, 0.2)]
    assert [view.crop.scale[0] for view in policy("moco")] == [0.2, 0.2]
    assert [(view.size, *view.crop.scale) for view in policy("swav")] == [(224, 0.14, 1.0)] * 2 + [(96, 0.05, 0.14)] * 6
    dino = [(view.size, view.gaussian_blur.probability, view.solarize) for view in policy("dino")]
    assert dino == [(224, 1.0, 0.0), (224, 0.1, 0.2)] + [(96, 0.5, 0.0)] * 8


def test_the_picture_shows_all_views(tmp_path: Path) -> None:
    words = [
        "transform.size=28",
        "transform.local_views.count=3",
        "transform.local_views.size=12",
        "rows=2",
        "epochs=1",
    ]
    config = load("plot_views", PictureConfig, [*words, f"output={tmp_path / 'views.png'}"])
    with Image.open(draw(config)) as picture:
        size = picture.size
    assert size == (4 + 3 * (28 * 3 + 4) + 3 * (12 * 3 + 4), 4 + 2 * (28 * 3 + 4))
    with pytest.raises(ConfigError, match="no picture's name"):
        draw(config.model_copy(update={"output": "transform.txt"}))


def test_the_picture_is_a_few_epochs_of_images_from_all_over_the_data(tmp_path: Path) -> None:
    words = ["data=fashion_domains", "transform.size=16", f"output={tmp_path / 'views.png'}"]
    with Image.open(draw(load("plot_views", PictureConfig, words))) as picture:
        assert picture.size == (4 + (1 + 4 * 2) * (6 * 16 + 4), 4 + 8 * (6 * 16 + 4))
    source = load("plot_views", PictureConfig, words).data.open("train")
    assert source is not None
    plain = columns_of(source, ViewsConfig(size=28), 0, 8, 1)[0]
    assert torch.equal(plain, columns_of(source, ViewsConfig(size=28), 0, 8, 1)[0])
    assert not torch.equal(plain, columns_of(source, ViewsConfig(size=28), 1, 8, 1)[0])
    assert source.pixels is not None
    index = [int((source.pixels == image).flatten(1).all(1).nonzero()[0]) for image in (plain * 255).round().byte()]
    assert source.domains is not None
    assert source.labels is not None
    assert index == sorted(index)
    assert index[-1] > len(source) // 2
    assert len(set(source.labels[index].tolist())) > 3
    assert len(set(source.domains[index].tolist())) > 1


def test_the_picture_takes_data_and_views_of_a_recipe_and_its_own_length(tmp_path: Path) -> None:
    config = load("plot_views", PictureConfig, ["recipe=cifar10_byol_pretrain", f"output={tmp_path / 'views.png'}"])
    assert (config.data.name, config.transform.size, config.epochs, config.rows) == ("torchvision", 32, 4, 8)
    for word in ("row=3", "batch_size=3", "epochs=100", "lr=1"):
        with pytest.raises(ConfigError, match=word.split("=")[0]):
            load("plot_views", PictureConfig, [word])
    with pytest.raises(ConfigError, match="no folder"):
        draw(config.model_copy(update={"output": str(tmp_path / "nowhere" / "views.png")}))
