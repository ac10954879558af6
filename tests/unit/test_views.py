from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as tvf
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.rng import NamedRNG
from ssl_pipeline.transforms import augment
from ssl_pipeline.transforms.augment import Augmentation, rotate
from ssl_pipeline.transforms.config import (
    BlurConfig,
    CropConfig,
    ErasingConfig,
    JitterConfig,
    RotationConfig,
    ViewConfig,
    ViewsConfig,
)
from ssl_pipeline.transforms.crop import crop_boxes, resize_box_of_image, resize_boxes
from ssl_pipeline.transforms.multi_view import Views

SEED = torch.Generator().manual_seed(0)
PHOTOS = torch.rand(5, 3, 24, 24, generator=SEED)
STRENGTHS = torch.tensor([0.2, 0.8, 1.0, 1.3, 1.8])


def full(config: ViewsConfig, channels: int = 3) -> ViewsConfig:
    return config.for_channels(channels)[0]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (augment.brightness, tvf.adjust_brightness),
        (augment.contrast, tvf.adjust_contrast),
        (augment.saturation, tvf.adjust_saturation),
    ],
)
def test_photometry_is_torchvisions(ours, theirs) -> None:  # type: ignore[no-untyped-def]
    expected = torch.stack([theirs(photo, float(s)) for photo, s in zip(PHOTOS, STRENGTHS, strict=True)])
    torch.testing.assert_close(ours(PHOTOS, STRENGTHS), expected, atol=2e-3, rtol=0)


def test_hue_is_torchvisions() -> None:
    turns = torch.tensor([-0.5, -0.1, 0.0, 0.2, 0.5])
    expected = torch.stack([tvf.adjust_hue(photo, float(t)) for photo, t in zip(PHOTOS, turns, strict=True)])
    torch.testing.assert_close(augment.hue(PHOTOS, turns), expected, atol=1e-4, rtol=0)


def test_hue_of_grayscale_pixels_stays() -> None:
    flat = torch.full((1, 3, 4, 4), 0.3)
    torch.testing.assert_close(augment.hue(flat, torch.tensor([0.3])), flat)


def test_blur_is_torchvisions_inside() -> None:
    sigma = torch.tensor([0.5, 1.0, 1.5, 0.1, 0.8])
    ours = augment.gaussian_blur(PHOTOS, sigma, 1.5)
    theirs = torch.stack([tvf.gaussian_blur(p, [23, 23], [float(s)] * 2) for p, s in zip(PHOTOS, sigma, strict=True)])
    torch.testing.assert_close(ours[..., 8:16, 8:16], theirs[..., 8:16, 8:16], atol=1e-4, rtol=0)
    torch.testing.assert_close(augment.gaussian_blur(torch.ones(2, 1, 9, 9), sigma[:2], 1.0), torch.ones(2, 1, 9, 9))


def test_grayscale_and_solarize_are_torchvisions() -> None:
    torch.testing.assert_close(augment.grayscale(PHOTOS), tvf.rgb_to_grayscale(PHOTOS, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(augment.solarize(PHOTOS), tvf.solarize(PHOTOS, 0.5))


@pytest.mark.parametrize("angle", [-130.0, 17.0, 90.0])
def test_rotation_is_torchvisions_inside(angle: float) -> None:
    ours = rotate(PHOTOS, torch.full((5,), angle))
    theirs = tvf.rotate(PHOTOS, angle, tvf.InterpolationMode.BILINEAR)
    torch.testing.assert_close(ours[..., 5:19, 5:19], theirs[..., 5:19, 5:19], atol=1e-4, rtol=0)
    assert bool((ours[..., 0, 0] > 0).all())  # no black corners


def test_erasing_takes_boxes_of_the_asked_share_and_leaves_the_mean() -> None:
    size, count = 24, 2000
    config = ViewConfig(
        size=size, horizontal_flip=0, color_jitter=JitterConfig(probability=0), grayscale=0,
        erasing=ErasingConfig(probability=0.5, scale=(0.1, 0.3)),
    )  # fmt: skip
    look = Augmentation(config.settled(3, "views")[0], (0.2,) * 3, (0.5,) * 3)
    views = look(torch.ones(count, 3, size, size), NamedRNG(torch.arange(count), 0, "views"))
    erased = views == 0
    assert torch.equal(erased[:, 0], erased[:, 2])
    share = erased[:, 0].float().mean((1, 2))
    assert abs(float((share > 0).float().mean()) - 0.5) < 4 * (0.25 / count) ** 0.5
    assert float(share[share > 0].min()) > 0.08
    assert float(share.max()) < 0.32
    assert abs(float(share[share > 0].mean()) - 0.2) < 0.01
    torch.testing.assert_close(views[~erased], torch.tensor(1.6).expand(int((~erased).sum())))


@pytest.mark.parametrize("box", [(0, 0, 24, 24), (3, 5, 7, 9), (10, 2, 13, 22), (23, 23, 1, 1)])
@pytest.mark.parametrize("size", [8, 24, 40])
def test_resize_is_torchvisions(box: tuple[int, int, int, int], size: int) -> None:
    pixels = (PHOTOS[:1] * 255).round().to(torch.uint8)
    ours = resize_boxes(pixels, torch.tensor([box]), size, torch.tensor([False]))
    theirs = tvf.resized_crop(pixels.float() / 255, *box, [size, size], antialias=True)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sides", [(40, 33), (70, 90)])
@pytest.mark.parametrize("channels", [1, 3])
def test_all_paths_make_the_same_view(sides: tuple[int, int], channels: int) -> None:
    """Files, images in memory on a CPU (small and large), and matrices as on an accelerator."""
    pixels = (torch.rand(8, channels, *sides, generator=SEED) * 255).to(torch.uint8)
    index = torch.arange(100, 108)
    config = full(ViewsConfig(size=16, rotation=RotationConfig(probability=0.5)), channels)
    views = Views(config, (0.0,) * channels, (1.0,) * channels, seed=3)
    files = [Image.fromarray(p.squeeze(0).numpy() if channels == 1 else p.permute(1, 2, 0).numpy()) for p in pixels]
    of_pixels, of_files = views.of_pixels(pixels, index, 2), views.of_files(files, index, 2)
    for view in range(2):
        draws = NamedRNG(index, 3, "views", 2, view)
        boxes = crop_boxes(draws, torch.full((8,), sides[0]), torch.full((8,), sides[1]), config.crop)
        matrices = resize_boxes(pixels, boxes, 16, draws.happens("flip", 0.5))
        for crops in (of_pixels[view], of_files[view]):
            values = crops.float() / 255 if crops.dtype == torch.uint8 else crops
            assert float((values - matrices).abs().max()) <= 1.001 / 255
    same = zip(views.finish(of_pixels, index, 2), views.finish(of_files, index, 2), strict=True)
    assert all(float((ours - theirs).abs().mean()) < 4 / 255 for ours, theirs in same)


@pytest.mark.parametrize("channels", [2, 5])
def test_images_of_other_channels_keep_them(channels: int) -> None:
    pixels = (torch.rand(3, channels, 60, 60, generator=SEED) * 255).to(torch.uint8)
    views = Views(full(ViewsConfig(size=50), channels), (0.5,) * channels, (0.2,) * channels, seed=0)
    index = torch.arange(3)
    for view in views.finish(views.of_pixels(pixels, index, 0), index, 0):
        assert view.shape == (3, channels, 50, 50)
        grayscale = augment.contrast(view, torch.zeros(3)).clamp(0, 1)
        torch.testing.assert_close(grayscale, view.mean((1, 2, 3), keepdim=True).clamp(0, 1).expand_as(view))
        assert bool(view.isfinite().all())


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_files_are_resized_as_by_pillow(mode: str) -> None:
    pixels = (torch.rand(70, 90, 4, generator=SEED) * 255).to(torch.uint8).numpy()
    image = Image.fromarray(pixels, "CMYK").convert(mode)
    for size in (16, 100):
        theirs = image.crop((7, 3, 67, 53)).resize((size, size), Image.Resampling.BILINEAR)
        expected = torch.from_numpy(np.array(theirs)).reshape(size, size, -1).permute(2, 0, 1)
        ours = resize_box_of_image(image, torch.tensor([3, 7, 50, 60]), size)
        assert int((ours.int() - expected.int()).abs().max()) <= 1


def test_mirror_mirrors() -> None:
    pixels = (PHOTOS[:2] * 255).to(torch.uint8)
    box = torch.tensor([[0, 0, 24, 24]] * 2)
    views = resize_boxes(pixels, box, 24, torch.tensor([True, False]))
    torch.testing.assert_close(views[0], pixels[0].flip(-1) / 255)
    torch.testing.assert_close(views[1], pixels[1] / 255)
    file = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    assert torch.equal(resize_box_of_image(file, box[0], 24, mirrored=True), pixels[0].flip(-1))


def test_boxes_have_torchvisions_statistics_and_fit() -> None:
    count, crop = 4000, CropConfig(scale=(0.2, 1.0))
    sides = torch.full((count,), 32)
    boxes = crop_boxes(NamedRNG(torch.arange(count), 0, "views"), sides, sides, crop).float()
    torch.manual_seed(0)
    image = torch.empty(3, 32, 32)
    theirs = (
        torch.tensor([T.RandomResizedCrop.get_params(image, [0.2, 1], [3 / 4, 4 / 3]) for _ in range(count)])
        if hasattr(T.RandomResizedCrop, "get_params")
        else _torchvisions_boxes(count)
    )
    for ours, other in zip(boxes.T, theirs.float().T, strict=True):
        spread = (float(ours.var() + other.var()) / count) ** 0.5
        assert abs(float(ours.mean() - other.mean())) < 4 * spread
    assert bool((boxes[:, 0] + boxes[:, 2] <= 32).all())
    assert bool((boxes[:, 1] + boxes[:, 3] <= 32).all())
    assert bool((boxes[:, 2:] >= 1).all())


def _torchvisions_boxes(count: int) -> Tensor:
    import torchvision.transforms as old

    image = torch.empty(3, 32, 32)
    boxes = [old.RandomResizedCrop.get_params(image, [0.2, 1], [3 / 4, 4 / 3]) for _ in range(count)]
    return torch.tensor(boxes)


def test_a_shape_that_never_fits_falls_back_to_the_center() -> None:
    boxes = crop_boxes(
        NamedRNG(torch.arange(4), 0, "views"), torch.full((4,), 10), torch.full((4,), 100), CropConfig(scale=(0.9, 1.0))
    )
    assert boxes.tolist() == [[0, 43, 10, 13]] * 4


def test_a_view_is_its_samples_own() -> None:
    pixels = (PHOTOS * 255).to(torch.uint8)
    index = torch.tensor([7, 3, 9, 1, 5])
    config = full(ViewsConfig(size=12, gaussian_blur=BlurConfig(probability=0.5), solarize=0.3))
    views = Views(config, (0.5,) * 3, (0.2,) * 3, seed=1)
    whole = views.finish(views.of_pixels(pixels, index, 4), index, 4)
    alone = views.finish(views.of_pixels(pixels[2:3], index[2:3], 4), index[2:3], 4)
    for view in range(2):
        torch.testing.assert_close(whole[view][2:3], alone[view], atol=1e-5, rtol=0)
    assert not torch.equal(whole[0], whole[1])
    again = views.finish(views.of_pixels(pixels, index, 5), index, 5)
    assert not torch.equal(whole[0], again[0])


def test_grayscale_images_lose_color_operations_under_auto_and_refuse_them_by_name() -> None:
    settled, notes = ViewsConfig().for_channels(1)
    assert (settled.color_jitter.saturation, settled.color_jitter.hue, settled.grayscale) == (0, 0, 0)
    assert "saturation, hue, grayscale dropped" in notes[0]
    assert full(ViewsConfig()).color_jitter.hue == pytest.approx(0.1)
    with pytest.raises(ConfigError, match=r"transform\.color_jitter\.hue"):
        ViewsConfig(color_jitter=JitterConfig(hue=0.1)).for_channels(1)
