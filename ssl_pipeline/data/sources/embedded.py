"""The images that travel with the package: 10,000 of Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ssl_pipeline.data import embedded
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.source import SourceConfig
from ssl_pipeline.data.sources.fashion_mnist import read_splits
from ssl_pipeline.data.splits import Split


class Config(SourceConfig):
    """A subset of Fashion-MNIST: 8,000 training images, of which ``val`` are held out, and 2,000 test images.

    Attributes:
        val: training images held out for choices, outside of pretraining and of label draws.
    """

    val: int = Field(1000, ge=1, le=4000)

    def open(self, split: Split) -> ArrayDataset:
        """A split; ``val`` is the same for every seed."""
        assert embedded.__file__ is not None
        return read_splits("embedded", Path(embedded.__file__).parent, self.val)[split]
