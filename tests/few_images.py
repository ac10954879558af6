"""A data source of a few of the embedded images: ``data.name=tests.few_images``."""

from __future__ import annotations

import torch

from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.sources import embedded
from ssl_pipeline.data.splits import Split

COUNT = {"train": 640, "val": 200, "test": 200}


class Config(embedded.Config):
    """Enough to train on, and few to measure on, which is what most of a tiny run would go into."""

    def open(self, split: Split) -> ArrayDataset:
        source = super().open(split)
        return source.select(torch.arange(min(len(source), COUNT[split])))
