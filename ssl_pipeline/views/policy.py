"""The random views of an image: what a policy may do, and how it is applied to a batch.

A batch's views are a list: ``count`` global ones, then the ``local`` ones of multi-crop. Every choice is a named draw (``ssl_pipeline.draws``), so a view depends on the seed, the epoch, the sample and the view's
number alone. Colour jitter runs in the fixed order brightness, contrast, saturation, hue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import Field, model_serializer, model_validator
from torch import Tensor

from ssl_pipeline.config.base import ConfigError, Strict
from ssl_pipeline.draws import Draws
from ssl_pipeline.views import photometry
from ssl_pipeline.views.geometry import CropConfig, crop_boxes, reductions, resize_box_of_file, resize_boxes

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


class ViewConfig(Strict):
    """The policy of one view.

    Attributes:
        size: height and width of the view in pixels.
        crop: the random resized crop.
        flip: probability of a horizontal mirror.
        jitter: colour jitter.
        grey: probability of dropping the colours; ``auto`` is 0.2 on RGB, 0 otherwise.
        blur: Gaussian blur.
        solarise: probability of inverting the bright half of the values.
    """

    size: int = Field(32, ge=8)
    crop: CropConfig = CropConfig()
    flip: Probability = 0.5
    jitter: JitterConfig = JitterConfig()
    grey: Probability | Literal["auto"] = "auto"
    blur: BlurConfig = BlurConfig()
    solarise: Probability = 0.0

    def settled(self, channels: int, key: str) -> tuple[ViewConfig, list[str]]:
        """This policy without ``auto``, and the names of the colour operations that the images' channels forbid.

        Raises:
            ConfigError: a colour operation was asked for by name on images that have no colours.
        """
        jitter, rgb = self.jitter, channels == 3
        asked = {"jitter.saturation": jitter.saturation, "jitter.hue": jitter.hue, "grey": self.grey}
        refused = [name for name, value in asked.items() if not rgb and value not in ("auto", 0)]
        if refused:
            raise ConfigError(
                [
                    f"`{key}.{name}` needs RGB images, and these have {channels} channel(s): set it to 0 or auto."
                    for name in refused
                ]
            )
        defaults = {"jitter.saturation": jitter.brightness, "jitter.hue": jitter.brightness / 4, "grey": 0.2}
        value = {name: (defaults[name] if rgb else 0.0) if asked[name] == "auto" else asked[name] for name in asked}
        dropped = [name.removeprefix("jitter.") for name in asked if not rgb and asked[name] == "auto"]
        colours = {"saturation": value["jitter.saturation"], "hue": value["jitter.hue"]}
        settled = self.model_copy(update={"jitter": jitter.model_copy(update=colours), "grey": value["grey"]})
        return settled, dropped


class ViewChanges(Strict):
    """What a view does otherwise than the base policy; what is left out, also inside a group, is the base's.

    Attributes:
        crop: the random resized crop.
        flip: probability of a horizontal mirror.
        jitter: colour jitter.
        grey: probability of dropping the colours.
        blur: Gaussian blur.
        solarise: probability of inverting the bright half of the values.
    """

    crop: CropConfig | None = None
    flip: Probability | None = None
    jitter: JitterConfig | None = None
    grey: Probability | Literal["auto"] | None = None
    blur: BlurConfig | None = None
    solarise: Probability | None = None

    @model_serializer
    def _only_what_was_given(self) -> dict[str, Any]:
        """A dumped group must not grow the keys that were left out: read again, they would be changes."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            name: value.model_dump(mode="json", exclude_unset=True) if isinstance(value, Strict) else value
            for name, value in values.items()
        }

    def on(self, base: ViewConfig) -> ViewConfig:
        """The base policy with these changes."""
        changes = {name: getattr(self, name) for name in ViewConfig.model_fields if hasattr(self, name)}
        update = {
            name: getattr(base, name).model_copy(update={key: getattr(change, key) for key in change.model_fields_set})
            if isinstance(change, Strict)
            else change
            for name, change in changes.items()
            if change is not None
        }
        return base.model_copy(update=update)


class LocalConfig(ViewChanges):
    """Multi-crop's small views of small boxes, beside the global ones (Caron et al. 2020).

    Attributes:
        count: local views of an image.
        size: their height and width in pixels.
    """

    count: int = Field(0, ge=0)
    size: int = Field(96, ge=8)
    crop: CropConfig | None = CropConfig(scale=(0.05, 0.14))


class ViewsConfig(ViewConfig):
    """The views of an image: the keys of :class:`ViewConfig` are the first view's, and all others' unless changed.

    Attributes:
        count: global views.
        second: what the second and later global views do otherwise (BYOL, Grill et al. 2020); null changes nothing.
        local: multi-crop's local views, which follow the global ones.
    """

    count: int = Field(2, ge=1)
    second: ViewChanges | None = None
    local: LocalConfig = LocalConfig()

    @model_validator(mode="after")
    def _second_is_there(self) -> ViewsConfig:
        if self.second and self.count == 1:
            raise ValueError("`second` changes the second view, and `count` is 1: set second=null.")
        return self

    @property
    def total(self) -> int:
        """The number of all views."""
        return self.count + self.local.count

    def each(self) -> list[ViewConfig]:
        """The policy of every view: ``count`` global ones, then the local ones."""
        base = ViewConfig(**{name: getattr(self, name) for name in ViewConfig.model_fields})
        later = self.second.on(base) if self.second else base
        return [base, *[later] * (self.count - 1), *[self.local.on(base)] * self.local.count]

    def for_channels(self, channels: int) -> tuple[ViewsConfig, list[str]]:
        """Settles what is ``auto``: images that are not RGB keep their channels and lose the colour operations.

        Returns:
            The policy without ``auto``, and notes for the log.

        Raises:
            ConfigError: a colour operation was asked for by name on images that have no colours.
        """
        views = self.each()
        base, dropped = views[0].settled(channels, "views")
        update: dict[str, Any] = {name: getattr(base, name) for name in ViewConfig.model_fields}
        if self.second and self.count > 1:
            second, _ = views[1].settled(channels, "views.second")
            update["second"] = self.second.model_copy(update={"jitter": second.jitter, "grey": second.grey})
        if self.local.count:
            local, _ = views[-1].settled(channels, "views.local")
            update["local"] = self.local.model_copy(update={"jitter": local.jitter, "grey": local.grey})
        notes = [f"views: {', '.join(dropped)} dropped, images with {channels} channel(s) have no colours"]
        return self.model_copy(update=update), notes if dropped else []


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
        self._policies = config.each()
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
            One float32 tensor in [0, 1] per view, of shape (B, C, S, S) with the view's own size S.
        """
        heights, widths = (torch.full_like(index, side) for side in pixels.shape[2:])
        crops = []
        for view, policy in enumerate(self._policies):
            draws = self._draws(index, epoch, view)
            boxes = crop_boxes(draws, heights, widths, policy.crop)
            crops.append(resize_boxes(pixels, boxes, policy.size, draws.happens("flip", policy.flip)))
        return crops

    def reductions(self, sizes: tuple[Tensor, Tensor], index: Tensor, epoch: int) -> list[int]:
        """By how much each image may be shrunk while it is decoded, so that no view loses pixels: 1, 2, 4 or 8.

        Args:
            sizes: the images' heights and widths, int64 of shape (B,).
            index: int64 of shape (B,).
            epoch: the epoch.
        """
        least = torch.full_like(index, 8)
        for view, policy in enumerate(self._policies):
            boxes = crop_boxes(self._draws(index, epoch, view), *sizes, policy.crop)
            least = torch.minimum(least, reductions(boxes, policy.size))
        return least.tolist()

    def of_files(
        self, images: list[Image.Image], index: Tensor, epoch: int, sizes: tuple[Tensor, Tensor] | None = None
    ) -> list[Tensor]:
        """The cropped views of decoded files, in a worker.

        Args:
            images: the images, perhaps shrunk.
            index: int64 of shape (B,).
            epoch: the epoch.
            sizes: heights and widths of the whole images, which the boxes are drawn in; None if none is shrunk.

        Returns:
            One uint8 tensor of shape (B, C, S, S) per view.
        """
        shown = torch.tensor([[image.height, image.width] for image in images])
        heights, widths = shown.unbind(1) if sizes is None else sizes
        scale = (shown.double() / torch.stack([heights, widths], 1)).repeat(1, 2)
        crops = []
        for view, policy in enumerate(self._policies):
            draws = self._draws(index, epoch, view)
            boxes = crop_boxes(draws, heights, widths, policy.crop) * scale
            flips = draws.happens("flip", policy.flip).tolist()
            views = zip(images, boxes, flips, strict=True)
            crops.append(torch.stack([resize_box_of_file(i, box, policy.size, flip) for i, box, flip in views]))
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
        for view, (policy, crop) in enumerate(zip(self._policies, crops, strict=True)):
            images = crop.float() / 255 if crop.dtype == torch.uint8 else crop
            images = _photometry(images, self._draws(index.to(images.device), epoch, view), policy)
            mean, std = self._mean.to(images.device), self._std.to(images.device)
            finished.append(images.sub(mean).div_(std))
        return finished


def _photometry(images: Tensor, draws: Draws, config: ViewConfig) -> Tensor:
    jitter = config.jitter
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
