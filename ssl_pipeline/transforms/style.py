"""An image in the style of another: Fourier amplitudes carry contrast and texture, and phases carry the shapes."""

from __future__ import annotations

import torch
from torch import Tensor


def restyle(images: Tensor, styles: Tensor, strength: Tensor) -> Tensor:
    """Images whose Fourier amplitude moves towards others', while the phase stays (Xu et al. 2021, arXiv 2105.11120).

    Args:
        images: float of shape (B, C, H, W).
        styles: likewise: image i goes towards style i.
        strength: shape (B,): 0 changes nothing, 1 takes the other's amplitude.

    Returns:
        The same shape and dtype; values may lie outside of the range of the images'.
    """
    spectrum, other = torch.fft.rfft2(images.float()), torch.fft.rfft2(styles.float())
    amplitude = torch.lerp(spectrum.abs(), other.abs(), strength[:, None, None, None])
    restyled: Tensor = torch.fft.irfft2(torch.polar(amplitude, spectrum.angle()), s=images.shape[-2:])
    return restyled.to(images.dtype)
