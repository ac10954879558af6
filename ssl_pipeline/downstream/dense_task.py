"""Tasks whose head reads feature maps, of whole images; metrics are taken at an image's own resolution."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.build import to_device
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.data.reading import read_readable
from ssl_pipeline.downstream.task import DownstreamConfig, DownstreamTask
from ssl_pipeline.evaluation.features import evaluating, gather_parts
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.transforms.config import ViewsConfig
from ssl_pipeline.transforms.preprocessing import Preprocessing


class DenseConfig(DownstreamConfig):
    """The base of the ``Config`` of tasks on feature maps."""

    reads_square = False

    def check_views(self, views: ViewsConfig) -> list[str]:
        if views.rotation.probability > 0:
            return ["`transform.rotation.probability` turns images away from their masks and boxes: set it to 0."]
        return []


class DenseTask(DownstreamTask):
    """An encoder whose maps a head reads; the loop trains the head. The neck, which makes a row of the maps, is idle."""

    head_is_solved = False
    reads_maps = True

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.fix_encoder(False)

    def prepare(self, images: list[Image.Image], preprocessing: Preprocessing) -> Tensor:
        return replace(preprocessing, whole=True).of_files(images)

    @abstractmethod
    def compare(self, prediction: Any, target: Any) -> Any:
        """What is to be known of one image's prediction, at the image's own resolution, to score it.

        Args:
            prediction: an entry of what ``predict`` gives.
            target: as ``Annotations.whole`` has it.
        """

    @abstractmethod
    def score(self, compared: list[Any]) -> dict[str, float]:
        """Named figures of what was compared; the first one decides selection, and larger is better."""

    @torch.no_grad()
    def evaluate(self, source: IndexedDataset, preprocessing: Preprocessing, share: DistInfo) -> dict[str, float]:
        """The figures of all images, each exactly once on any number of processes; those that can't be read are left out.

        Raises:
            ConfigError: no image can be read.
        """
        annotations = source.annotations
        assert annotations is not None
        whole = replace(preprocessing, whole=True)
        own = torch.arange(len(source)).tensor_split(share.processes)[share.rank]
        with evaluating(self):
            compared = gather_parts(
                (
                    self.compare(prediction, to_device(annotations.whole(i), share.device))
                    for index, images in read_readable(source, whole, share.device, own, chunk=16)
                    for i, prediction in zip(index.tolist(), self.predict(images), strict=True)
                ),
                share,
            )
        if not compared:
            raise ConfigError(f"{source.name}: none of its {len(source)} images can be read: replace the files.")
        return self.score(compared)
