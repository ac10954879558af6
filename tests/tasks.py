"""Tiny pretext tasks and batches, without data, loop or files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from ssl_pipeline.config.command import load
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.engine.loop import Callback
from ssl_pipeline.engine.task import PretextConfig, Task
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import EncoderSpec
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.pretrain_config import PretrainConfig
from ssl_pipeline.schedules import TrainProgress
from tests.runs import small_pretext


class Recorder(Callback):
    """Keeps the metrics of each step, and evaluates by a function."""

    def __init__(self, evaluate: Callable[[TrainProgress], dict[str, float]] | None = None, every: int = 0) -> None:
        self.metrics, self._function, self.evaluate_every = dict[int, dict[str, float]](), evaluate, every

    def evaluate(self, progress: TrainProgress) -> dict[str, float]:
        return {} if self._function is None else self._function(progress)

    def on_log(self, done: int, metrics: Mapping[str, float]) -> None:
        self.metrics[done] = dict(metrics)


def tiny_config(name: str, overrides: Sequence[str] = ()) -> PretextConfig:
    """A task's configuration with small heads."""
    return _tiny_config(name, tuple(overrides))


@cache
def _tiny_config(name: str, overrides: tuple[str, ...]) -> PretextConfig:
    config = load("pretrain", PretrainConfig, [*small_pretext(name), *overrides]).pretext
    assert isinstance(config, PretextConfig)
    return config


def tiny_task(name: str, overrides: Sequence[str] = (), samples: int = 8, seed: int = 0) -> tuple[Task, Batch]:
    """A task, primed, and a batch of all samples at step 0 of 10."""
    config = tiny_config(name, overrides)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (samples, 1, 12, 12), generator=generator, dtype=torch.uint8)
    source = ArrayDataset("random", pixels, torch.arange(samples) % 2, ("a", "b"))
    blueprint = EncoderSpec(
        backbone=BackboneConfig(width=4), neck=NeckConfig(), channels=1, size=12, mean=(0.0,), std=(1.0,)
    )
    torch.manual_seed(seed)
    task = config.build(blueprint.build()[0], source)
    with torch.no_grad():
        task.prime(lambda forward: forward(pixels.float() / 255))
    return task, tiny_batch(task, config.views_needed or 2, samples, 0)


def tiny_batch(task: Task, views: int, samples: int, step: int, local: int = 0) -> Batch:
    """Random views of all samples."""
    generator = torch.Generator().manual_seed(100 + step)
    images: list[Tensor] = [torch.randn(samples, 1, 12, 12, generator=generator) for _ in range(views)]
    images += [torch.randn(samples, 1, 8, 8, generator=generator) for _ in range(local)]
    labels = torch.arange(samples) % 2 if task.reads_labels else None
    return Batch(TrainProgress(step, 10, 1), torch.arange(samples), images, labels)


def as_group_norm(module: nn.Module) -> nn.Module:
    """Norms that treat samples apart; a teacher's stay as fixed as they were."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            learns = any(parameter.requires_grad for parameter in child.parameters())
            setattr(module, name, nn.GroupNorm(1, child.num_features).requires_grad_(learns))
        else:
            as_group_norm(child)
    return module
