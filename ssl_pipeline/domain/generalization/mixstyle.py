"""MixStyle: each image's feature statistics are mixed with those of another one, while training."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import Beta

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.domain.method import GeneralizationConfig, SourceTask
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.downstream.regime import TrainContext


class Config(GeneralizationConfig):
    """MixStyle with random pairs (Zhou et al. 2021).

    Attributes:
        levels: how many of the backbone's levels are mixed, from the finest.
        probability: how often a batch is mixed at a level.
        alpha: of the Beta distribution that the shares are drawn from.
    """

    levels: int = Field(2, ge=1)
    probability: float = Field(0.5, ge=0, le=1)
    alpha: float = Field(0.1, gt=0)

    def build(self, classifier: Classification, target: IndexedDataset) -> MixStyle:
        if not any(level.modules for level in classifier.encoder.backbone.levels.values()):
            raise ConfigError("`domain=mixstyle` needs a convolutional backbone of torchvision's or small_resnet.")
        return MixStyle(self, classifier)


def mix_statistics(maps: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Maps (B, C, H, W) whose channels' mean and deviation move to those of other samples (B,), but for a share (B,) of their own."""
    mean, deviation = maps.mean((2, 3), keepdim=True).detach(), (maps.var((2, 3), keepdim=True) + 1e-6).sqrt().detach()
    share = share[:, None, None, None]
    new_mean, new_deviation = (share * own + (1 - share) * own[other] for own in (mean, deviation))
    return (maps - mean) / deviation * new_deviation + new_mean


class MixStyle(SourceTask):
    """See :class:`Config`."""

    config: Config

    def __init__(self, config: Config, classifier: Classification) -> None:
        super().__init__(config, classifier)
        backbone = classifier.encoder.backbone
        ends = [level.modules[-1] for level in backbone.levels.values() if level.modules]
        self._hooks = [
            backbone.trunk.get_submodule(end).register_forward_hook(self._mix) for end in ends[: config.levels]
        ]

    def _mix(self, module: nn.Module, arguments: Any, maps: Tensor) -> Tensor:
        if not module.training or float(torch.rand(())) >= self.config.probability:  # reseeded by the step's name
            return maps
        share = Beta(self.config.alpha, self.config.alpha).sample((len(maps),)).to(maps)
        return mix_statistics(maps, torch.randperm(len(maps), device=maps.device), share)

    def finish(self, target: IndexedDataset, context: TrainContext) -> None:
        """The classifier goes on without its hooks."""
        for hook in self._hooks:
            hook.remove()
