"""Folders of small images with a planted signal: the color tells the class."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

COLORS = {"blue": (30, 60, 200), "green": (40, 190, 70), "red": (210, 50, 40)}


def color_folder(root: Path, count: int = 20) -> Path:
    """One folder per color, with noisy images of 20 × 18 pixels."""
    generator = torch.Generator().manual_seed(0)
    for name, color in COLORS.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise = torch.randint(-25, 26, (18, 20, 3), generator=generator)
            pixels = (torch.tensor(color) + noise).clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.png")
    return root
