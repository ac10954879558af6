"""The random views of an image: what a policy may do, and how it is applied to a batch.

Every choice is a named draw (``ssl_pipeline.draws``), so a view depends on the seed, the epoch, the sample and the view's
number alone. Colour jitter runs in the fixed order brightness, contrast, saturation, hue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, Strict
from ssl_pipeline.draws import Draws
from ssl_pipeline.views import photometry
from ssl_pipeline.views.geometry import CropConfig, crop_boxes, resize_box_of_file, resize_boxes

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=1)]


class JitterConfig(Strict):
    """Colour jitter (SimCLR, Chen et al. 2020, appendix A).

    Attributes:
        probability: how often it is applied.
        brightness: factors are drawn from [1 - b, 1 + b].
        contrast: likewise.
        saturation: likewise; ``auto`` is brightness on RGB, nothing on other images.
        hue: turns are drawn from [-h, h], at most 0.5; ``auto`` is a quarter of brightness on RGB, nothing otherwise.
    """

    probability: Probability = 0.8
    brightness: Strength = 0.4
    contrast: Strength = 0.4
    saturation: Strength | Literal["auto"] = "auto"
    hue: Annotated[float, Field(ge=0, le=0.5)] | Literal["auto"] = "auto"


class BlurConfig(Strict):
    """Gaussian blur; sigma in pixels is drawn between the two bounds."""

    probability: Probability = 0.0
    sigma: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.1, 2.0)


class ViewsConfig(Strict):
    """A policy of views.

    Attributes:
        size: height and width of a view in pixels.
        count: views of an image.
        crop: the random resized crop.
        flip: probability of a horizontal mirror.
        jitter: colour jitter.
        grey: probability of dropping the colours; ``auto`` is 0.2 on RGB, 0 otherwise.
        blur: Gaussian blur.
        solarise: probability of inverting the bright half of the values.
    """

    size: int = Field(32, ge=8)
    count: int = Field(2, ge=1)
    crop: CropConfig = CropConfig()
    flip: Probability = 0.5
    jitter: JitterConfig = JitterConfig()
    grey: Probability | Literal["auto"] = "auto"
    blur: BlurConfig = BlurConfig()
    solarise: Probability = 0.0

    def for_channels(self, channels: int) -> tuple[ViewsConfig, list[str]]:
        """Settles what is ``auto``: images that are not RGB keep their channels and lose the colour operations.

        Returns:
            The policy without ``auto``, and notes for the log.

        Raises:
            ConfigError: a colour operation was asked for by name on images that have no colours.
        """
        jitter, rgb = self.jitter, channels == 3
        asked = {"jitter.saturation": jitter.saturation, "jitter.hue": jitter.hue, "grey": self.grey}
        refused = [key for key, value in asked.items() if not rgb and value not in ("auto", 0)]
        if refused:
            raise ConfigError(
                [
                    f"`views.{key}` needs RGB images, and these have {channels} channel(s): set it to 0 or auto."
                    for key in refused
                ]
            )
        defaults = {"jitter.saturation": jitter.brightness, "jitter.hue": jitter.brightness / 4, "grey": 0.2}
        value = {key: (defaults[key] if rgb else 0.0) if asked[key] == "auto" else asked[key] for key in asked}
        dropped = [key.removeprefix("jitter.") for key in asked if not rgb and asked[key] == "auto"]
        notes = [f"views: {', '.join(dropped)} dropped, images with {channels} channel(s) have no colours"]
        settled = self.model_copy(
            update={
                "jitter": jitter.model_copy(
                    update={"saturation": value["jitter.saturation"], "hue": value["jitter.hue"]}
                ),
                "grey": value["grey"],
            }
        )
        return settled, notes if dropped else []


class Views:
    """Makes the views of a batch.

    Args:
        config: a settled policy (:meth:`ViewsConfig.for_channels`).
        mean: per-channel mean that the encoder expects.
        std: per-channel standard deviation that the encoder expects.
        seed: the run's seed.
    """

    def __init__(self, config: ViewsConfig, mean: tuple[float, ...], std: tuple[float, ...], seed: int) -> None:
        self.config, self.seed = config, seed
        self._mean, self._std = (torch.tensor(values)[None, :, None, None] for values in (mean, std))

    def _draws(self, index: Tensor, epoch: int, view: int) -> Draws:
        return Draws(index, self.seed, "views", epoch, view)

    def of_pixels(self, pixels: Tensor, index: Tensor, epoch: int) -> list[Tensor]:
        """The cropped views of equal-sized images, on their device.

        Args:
            pixels: uint8 of shape (B, C, H, W).
            index: int64 of shape (B,), on the CPU.
            epoch: the epoch.

        Returns:
            One float32 tensor of shape (B, C, size, size) in [0, 1] per view.
        """
        heights, widths = (torch.full_like(index, side) for side in pixels.shape[2:])
        crops = []
        for view in range(self.config.count):
            draws = self._draws(index, epoch, view)
            boxes = crop_boxes(draws, heights, widths, self.config.crop)
            crops.append(resize_boxes(pixels, boxes, self.config.size, draws.happens("flip", self.config.flip)))
        return crops

    def of_files(self, images: list[Image.Image], index: Tensor, epoch: int) -> list[Tensor]:
        """The cropped views of decoded files, in a worker: one uint8 tensor of shape (B, C, size, size) per view."""
        heights = torch.tensor([image.height for image in images])
        widths = torch.tensor([image.width for image in images])
        crops = []
        for view in range(self.config.count):
            draws = self._draws(index, epoch, view)
            boxes = crop_boxes(draws, heights, widths, self.config.crop)
            flips = draws.happens("flip", self.config.flip).tolist()
            views = zip(images, boxes, flips, strict=True)
            crops.append(torch.stack([resize_box_of_file(i, box, self.config.size, flip) for i, box, flip in views]))
        return crops

    def finish(self, crops: list[Tensor], index: Tensor, epoch: int) -> list[Tensor]:
        """Photometry and normalisation, on the crops' device.

        Args:
            crops: per view float in [0, 1] or uint8, of shape (B, C, S, S).
            index: int64 of shape (B,).
            epoch: the epoch.

        Returns:
            Per view float32 of the same shape, normalised.
        """
        finished = []
        for view, crop in enumerate(crops):
            images = crop.float() / 255 if crop.dtype == torch.uint8 else crop
            images = self._photometry(images, self._draws(index.to(images.device), epoch, view))
            mean, std = self._mean.to(images.device), self._std.to(images.device)
            finished.append(images.sub(mean).div_(std))
        return finished

    def _photometry(self, images: Tensor, draws: Draws) -> Tensor:
        config, jitter = self.config, self.config.jitter
        assert jitter.saturation != "auto"
        assert jitter.hue != "auto"
        assert config.grey != "auto"
        jittered = draws.happens("jitter", jitter.probability)
        strengths: list[tuple[str, Callable[[Tensor, Tensor], Tensor], float, float]] = [
            ("brightness", photometry.brightness, 1.0, jitter.brightness),
            ("contrast", photometry.contrast, 1.0, jitter.contrast),
            ("saturation", photometry.saturation, 1.0, jitter.saturation),
            ("hue", photometry.hue, 0.0, jitter.hue),
        ]
        for name, operation, neutral, spread in strengths:
            if spread > 0 and jitter.probability > 0:
                drawn = draws.uniform(name, neutral - spread, neutral + spread)
                images = operation(images, torch.where(jittered, drawn, neutral))
        if config.grey > 0:
            images = photometry.grey(images, draws.happens("grey", config.grey))
        if config.blur.probability > 0:
            blurred = draws.happens("blur", config.blur.probability)
            sigma = draws.uniform("blur sigma", *config.blur.sigma)
            images = torch.where(blurred[:, None, None, None], photometry.blur(images, sigma), images)
        if config.solarise > 0:
            images = photometry.solarise(images, draws.happens("solarise", config.solarise))
        return images
