"""The random views of a batch of images: ``num_views`` global ones, then the ``local_views`` of multi-crop.

Every choice is a named draw (``ssl_pipeline.rng``), so a view depends on the seed, the epoch, the sample and the view's number
alone. Crop and mirror come first, in the workers where files differ in size; all else follows on the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.rng import NamedRNG
from ssl_pipeline.transforms.augment import Augmentation
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.crop import crop_boxes, reductions, resize_box_of_image, resize_boxes_fast, stack_views


class Views:
    """Makes the views of a batch.

    In what follows ``index`` are the samples, int64 of shape (B,), on the CPU.

    Args:
        config: a policy without ``auto`` (:meth:`ViewsConfig.for_channels`).
        mean: per channel, as the encoder expects it; ``std`` too.
        seed: the run's seed.
        styles: images whose amplitude restyled views take, float32 of shape (N, C, S, S) in [0, 1].
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
        self._augmentations = [Augmentation(policy, mean, std, styles) for policy in self._policies]

    def _draws(self, index: Tensor, epoch: int, view: int) -> NamedRNG:
        return NamedRNG(index, self.seed, "views", epoch, view)

    def boxes(self, index: Tensor, epoch: int, heights: Tensor, widths: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Where each view of images of some heights and widths, int64 of shape (B,), comes from.

        Yields:
            A view's size; its boxes, int64 of shape (B, 4): top, left, height, width; and which are mirrored, bool of shape (B,).
        """
        for view, policy in enumerate(self._policies):
            with torch.inference_mode():  # saves autograd's share of many small operations
                draws = self._draws(index, epoch, view)
                boxes = crop_boxes(draws, heights, widths, policy.crop)
                flips = draws.happens("flip", policy.horizontal_flip)
            yield policy.size, boxes, flips

    def of_pixels(self, pixels: Tensor, index: Tensor, epoch: int) -> list[Tensor]:
        """The cropped views of equal-sized images, uint8 of shape (B, C, H, W), on their device.

        Returns:
            Per view a tensor of shape (B, C, S, S), S its own size: float32 in [0, 1], or uint8.
        """
        heights, widths = (torch.full_like(index, side) for side in pixels.shape[2:])
        places = self.boxes(index, epoch, heights, widths)
        return [resize_boxes_fast(pixels, boxes, size, flips) for size, boxes, flips in places]

    def reductions(self, sizes: tuple[Tensor, Tensor], index: Tensor, epoch: int) -> list[int]:
        """By how much each image may shrink while it is decoded, so that no view loses pixels: 1, 2, 4 or 8."""
        factors = [reductions(boxes, size) for size, boxes, _ in self.boxes(index, epoch, *sizes)]
        return torch.stack(factors).amin(0).tolist()

    def of_files(
        self, images: list[Image.Image], index: Tensor, epoch: int, sizes: tuple[Tensor, Tensor] | None = None
    ) -> list[Tensor]:
        """The cropped views of decoded files, in a worker; boxes are drawn in the ``sizes`` before they were shrunk, if any was.

        Returns:
            Per view a tensor of shape (B, C, S, S): uint8, or float32 in [0, 1] where an image has more than 8 bits.
        """
        shown = torch.tensor([[image.height, image.width] for image in images])
        heights, widths = shown.unbind(1) if sizes is None else sizes
        scale = (shown.double() / torch.stack([heights, widths], 1)).repeat(1, 2)
        crops = []
        for size, boxes, flips in self.boxes(index, epoch, heights, widths):
            places = zip(images, boxes * scale, flips.tolist(), strict=True)
            views = [resize_box_of_image(image, box, size, flip) for image, box, flip in places]
            crops.append(stack_views(views, self._channels))
        return crops

    def bytes_of(self, samples: int, channels: int) -> int:
        """The bytes that :meth:`of_files` returns for a number of images."""
        return samples * channels * sum(policy.size**2 for policy in self._policies)

    def finish(self, crops: list[Tensor], index: Tensor, epoch: int) -> list[Tensor]:
        """What follows the crop, normalization included, on the crops' device: per view float32 of the same shape.

        The crops are uint8 or float in [0, 1], of shape (B, C, S, S); float crops are overwritten.
        """
        index = index.cpu()
        views = enumerate(zip(self._augmentations, crops, strict=True))
        return [augment(crop, self._draws(index, epoch, view)) for view, (augment, crop) in views]
