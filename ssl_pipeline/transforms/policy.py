"""The random views of an image: which there are, and how they are made of a batch.

A batch's views are a list: ``count`` global ones, then the ``local`` ones of multi-crop. Every choice is a named draw
(``ssl_pipeline.rng``), so a view depends on the seed, the epoch, the sample and the view's number alone. Boxes and mirrors
are applied first, in the workers where files differ in size; all else follows on the device, on views of one size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field, model_serializer, model_validator
from torch import Tensor

from ssl_pipeline.config.base import FrozenModel
from ssl_pipeline.rng import NamedRNG
from ssl_pipeline.transforms.appearance import Augmentation
from ssl_pipeline.transforms.config import (
    BlurConfig,
    ErasingConfig,
    JitterConfig,
    Probability,
    RestyleConfig,
    RotationConfig,
    ViewConfig,
)
from ssl_pipeline.transforms.geometry import (
    CropConfig,
    crop_boxes,
    reductions,
    resize_box_of_file,
    resize_boxes,
    resize_boxes_on_cpu,
    stack_views,
)


class ViewChanges(FrozenModel):
    """What a view does otherwise than the base policy; what is left out, also inside a group, is the base's.

    Attributes:
        crop: the random resized crop.
        flip: probability of a horizontal mirror.
        jitter: color jitter.
        grayscale: probability of dropping the colors.
        blur: Gaussian blur.
        solarize: probability of inverting the bright half of the values.
        rotation: rotation by any angle.
        erasing: erasing of a box.
        restyle: the style of another image.
    """

    crop: CropConfig | None = None
    flip: Probability | None = None
    jitter: JitterConfig | None = None
    grayscale: Probability | Literal["auto"] | None = None
    blur: BlurConfig | None = None
    solarize: Probability | None = None
    rotation: RotationConfig | None = None
    erasing: ErasingConfig | None = None
    restyle: RestyleConfig | None = None

    @model_serializer
    def _only_what_was_given(self) -> dict[str, Any]:
        """A dumped group must not grow the keys that were left out: read again, they would be changes."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            name: value.model_dump(mode="json", exclude_unset=True) if isinstance(value, FrozenModel) else value
            for name, value in values.items()
        }

    def on(self, base: ViewConfig) -> ViewConfig:
        """The base policy with these changes."""
        changes = {name: getattr(self, name) for name in ViewConfig.model_fields if hasattr(self, name)}
        update = {
            name: getattr(base, name).model_copy(update={key: getattr(change, key) for key in change.model_fields_set})
            if isinstance(change, FrozenModel)
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

    def shapes(self, channels: int) -> list[tuple[int, int, int]]:
        """Channels, height and width of each view of an image."""
        sizes = [self.size] * self.count + [self.local.size] * self.local.count
        return [(channels, size, size) for size in sizes]

    def each(self) -> list[ViewConfig]:
        """The policy of every view: ``count`` global ones, then the local ones."""
        base = ViewConfig(**{name: getattr(self, name) for name in ViewConfig.model_fields})
        later = self.second.on(base) if self.second else base
        return [base, *[later] * (self.count - 1), *[self.local.on(base)] * self.local.count]

    def for_channels(self, channels: int, key: str = "views") -> tuple[ViewsConfig, list[str]]:
        """Settles what is ``auto``: images that are not RGB keep their channels and lose the color operations.

        Args:
            channels: of the images.
            key: where this policy stands in the configuration.

        Returns:
            The policy without ``auto``, and notes for the log.

        Raises:
            ConfigError: a color operation was asked for by name on images that have no colors.
        """
        views = self.each()
        base, dropped = views[0].settled(channels, key)
        update: dict[str, Any] = {name: getattr(base, name) for name in ViewConfig.model_fields}
        if self.second and self.count > 1:
            second, _ = views[1].settled(channels, f"{key}.second")
            update["second"] = self.second.model_copy(update={"jitter": second.jitter, "grayscale": second.grayscale})
        if self.local.count:
            local, _ = views[-1].settled(channels, f"{key}.local")
            update["local"] = self.local.model_copy(update={"jitter": local.jitter, "grayscale": local.grayscale})
        notes = [f"{key}: {', '.join(dropped)} dropped, images with {channels} channel(s) have no colors"]
        return self.model_copy(update=update), notes if dropped else []


class Views:
    """Makes the views of a batch.

    Args:
        config: a settled policy (:meth:`ViewsConfig.for_channels`).
        mean: per-channel mean that the encoder expects.
        std: per-channel standard deviation that the encoder expects.
        seed: the run's seed.
        styles: images that lend their style to restyled views, float32 of shape (N, C, S, S) in [0, 1]
            (``data/styles.py`` draws them).
    """

    def __init__(
        self,
        config: ViewsConfig,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int,
        styles: Tensor | None = None,
    ) -> None:
        self.config, self.seed, self._channels = config, seed, len(mean)
        self._policies = config.each()
        self._appearances = [Augmentation(policy, mean, std, styles) for policy in self._policies]

    def _draws(self, index: Tensor, epoch: int, view: int) -> NamedRNG:
        return NamedRNG(index, self.seed, "views", epoch, view)

    def of_pixels(self, pixels: Tensor, index: Tensor, epoch: int) -> list[Tensor]:
        """The cropped views of equal-sized images, on their device.

        Args:
            pixels: uint8 of shape (B, C, H, W).
            index: int64 of shape (B,), on the CPU.
            epoch: the epoch.

        Returns:
            Per view a tensor of shape (B, C, S, S), S its own size: float32 in [0, 1], or uint8.
        """
        heights, widths = (torch.full_like(index, side) for side in pixels.shape[2:])
        resize = resize_boxes_on_cpu if pixels.device.type == "cpu" else resize_boxes
        crops = []
        for view, policy in enumerate(self._policies):
            with torch.inference_mode():  # saves autograd's share of many small operations
                draws = self._draws(index, epoch, view)
                boxes, flips = crop_boxes(draws, heights, widths, policy.crop), draws.happens("flip", policy.flip)
            crops.append(resize(pixels, boxes, policy.size, flips))
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
            One tensor of shape (B, C, S, S) per view: uint8, or float32 in [0, 1] where an image has more than 8 bits.
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
            crops.append(
                stack_views([resize_box_of_file(i, box, policy.size, flip) for i, box, flip in views], self._channels)
            )
        return crops

    def bytes_of(self, samples: int, channels: int) -> int:
        """What :meth:`of_files` gives for so many images, in bytes."""
        return samples * channels * sum(policy.size**2 for policy in self._policies)

    def finish(self, crops: list[Tensor], index: Tensor, epoch: int) -> list[Tensor]:
        """What follows the crop: style, rotation, photometry, normalization and erasing, on the crops' device.

        Args:
            crops: per view float in [0, 1] or uint8, of shape (B, C, S, S); float ones are worked on in place.
            index: int64 of shape (B,), on the CPU.
            epoch: the epoch.

        Returns:
            Per view float32 of the same shape, normalized.
        """
        index = index.cpu()
        views = zip(self._appearances, crops, strict=True)
        return [appearance(crop, self._draws(index, epoch, view)) for view, (appearance, crop) in enumerate(views)]
