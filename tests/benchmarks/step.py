"""Pretraining's throughput: against the model alone, and against lightly's own SimCLR loop at the same work.

All sides train SimCLR on the same images with the same optimizer and the same kinds of views. *Model only* repeats forward,
backward and step on two views that are there already. *Pretraining* is the loop that ``pretrain`` runs, with logs and a checkpoint.
*lightly* is its published example: PIL transforms in a DataLoader's workers, one forward a view, NT-Xent. They alternate within one
process, so that a slow minute of a shared machine hits all. Workers are started, and have batches waiting, before the clock is.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms.simclr_transform import SimCLRTransform
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_pipeline.data.dataset import ArrayDataset
from ssl_pipeline.data.loader import DistInfo, IndexedLoader
from ssl_pipeline.engine.checkpoint import Checkpoints
from ssl_pipeline.engine.distributed import dist_info, start_accelerator
from ssl_pipeline.engine.loop import Callback, fit
from ssl_pipeline.engine.optim import OptimConfig, build_optimizer
from ssl_pipeline.engine.train_state import TrainState
from ssl_pipeline.logging.jsonl import FILE_NAME, JsonlLogger
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.encoder import Encoder, EncoderSpec
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.pretext import simclr
from ssl_pipeline.transforms.config import BlurConfig, CropConfig, JitterConfig, ViewsConfig
from ssl_pipeline.transforms.multi_view import Views
from tests.benchmarks.clock import now
from tests.benchmarks.command import run

_SIZE, _WAITING, _WORKERS = 32, 4, 2
_OPTIM = OptimConfig(name="sgd")
_NEUTRAL = (0.5,) * 3, (0.25,) * 3
_VIEWS = ViewsConfig(  # what lightly's SimCLRTransform does by default
    size=_SIZE,
    crop=CropConfig(scale=(0.08, 1.0)),
    color_jitter=JitterConfig(probability=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
    grayscale=0.2,
    gaussian_blur=BlurConfig(probability=0.5, sigma=(0.1, 2.0)),
)


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Attributes:
        backbone: of all sides.
        batch: images of a step.
        steps: of a measurement.
    """

    backbone: BackboneConfig
    batch: int
    steps: int

    def source(self) -> ArrayDataset:
        """Random color images, as many as the steps take."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch * self.steps, 3, _SIZE, _SIZE)
        return ArrayDataset("random images", torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))

    def encoder(self) -> Encoder:
        """A fresh one."""
        mean, std = _NEUTRAL
        blueprint = EncoderSpec(backbone=self.backbone, neck=NeckConfig(), channels=3, size=_SIZE, mean=mean, std=std)
        return blueprint.build()[0]


# By the end of a figure's name; the first is torchvision's network as it is, which lightly's example trains.
_SETTINGS = {
    "": Setting(BackboneConfig(name="resnet18", stem="imagenet"), batch=128, steps=30),
    "_small_stem": Setting(BackboneConfig(name="resnet18", stem="small"), batch=128, steps=10),
    "_small": Setting(BackboneConfig(name="small_resnet", width=32, stem="imagenet"), batch=128, steps=40),
}


def measure(rounds: int) -> dict[str, float]:
    """ResNet-18 with either stem, and the quickstart's small ResNet, at 32 px in color, fp32: images a second, and their ratios."""
    accelerator, figures = start_accelerator(), dict[str, float]()
    for ending, setting in _SETTINGS.items():
        found = _compare(setting, rounds, accelerator)
        figures |= {
            f"step.model_only_images_per_s{ending}": found["model only"],
            f"step.pretraining_images_per_s{ending}": found["pretraining"],
            f"step.lightly_loop_images_per_s{ending}": found["lightly"],
            f"step.efficiency{ending}": found["efficiency"],
            f"step.speedup_vs_lightly_loop{ending}": found["speedup"],
        }
    return figures


def _compare(setting: Setting, rounds: int, accelerator: Accelerator) -> dict[str, float]:
    """Medians over the rounds: of the rates, and of the ratios within a round."""
    share, source = dist_info(accelerator), setting.source()
    views = Views(_VIEWS.for_channels(3)[0], *_NEUTRAL, seed=0)
    batches = IndexedLoader(source, views, setting.batch, 0, share, setting.steps)
    task = simclr.Config(name="simclr").build(setting.encoder(), source)
    task = task.to(share.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    theirs = _LightlyLoop(setting, source, share)
    _model_only(task, batches, accelerator)  # warms allocators and kernels up
    rates: dict[str, list[float]] = {"model only": [], "pretraining": [], "lightly": []}
    for _ in range(rounds):
        rates["model only"].append(_model_only(task, batches, accelerator))
        rates["pretraining"].append(_pretraining(task, batches, accelerator))
        rates["lightly"].append(theirs.run())
    figures = {name: statistics.median(values) for name, values in rates.items()}
    for name, below in (("efficiency", "model only"), ("speedup", "lightly")):
        figures[name] = statistics.median(a / b for a, b in zip(rates["pretraining"], rates[below], strict=True))
    return figures


def _model_only(task: simclr.SimCLR, batches: IndexedLoader, accelerator: Accelerator) -> float:
    batch = next(iter(batches.from_step(0)))
    optimizer = build_optimizer(_OPTIM, task, batches.batch_size)
    task.train()
    began = now(accelerator.device)
    for _ in range(batches.total_steps):
        with accelerator.autocast():
            output = task(batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return batches.total_steps * batches.batch_size / (now(accelerator.device) - began)


class _Log(Callback):
    """Writes metrics.jsonl."""

    def __init__(self, log: JsonlLogger) -> None:
        self._log = log

    def on_log(self, done: int, metrics: Mapping[str, float]) -> None:
        self._log.log(done, metrics)


def _pretraining(task: simclr.SimCLR, batches: IndexedLoader, accelerator: Accelerator) -> float:
    optimizer = build_optimizer(_OPTIM, task, batches.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        log = JsonlLogger(Path(folder) / FILE_NAME)
        checkpoints = Checkpoints(Path(folder) / "checkpoints")
        began = now(accelerator.device)
        fit(TrainState(task, optimizer, _OPTIM, accelerator, checkpoints), batches, [_Log(log)], log_every=10)
        seconds = now(accelerator.device) - began
        log.finish()
    accelerator.free_memory()
    return batches.total_steps * batches.batch_size / seconds


class _Pictures(Dataset[list[Tensor]]):
    """The source's images through lightly's transform; as many more of them as wait before the clock starts."""

    def __init__(self, source: ArrayDataset, more: int) -> None:
        self._pictures: list[Image.Image] = [source.open_image(i) for i in range(len(source))]
        self._more, self._transform = more, SimCLRTransform(input_size=_SIZE)

    def __len__(self) -> int:
        return len(self._pictures) + self._more

    def __getitem__(self, index: int) -> list[Tensor]:
        views = self._transform(self._pictures[index % len(self._pictures)])
        return [torch.as_tensor(view) for view in views]


class _LightlyLoop:
    """lightly's SimCLR example."""

    def __init__(self, setting: Setting, source: ArrayDataset, share: DistInfo) -> None:
        self._setting, self._device = setting, share.device
        self._encoder = setting.encoder().to(share.device)
        head = simclr.Config(name="simclr")
        self._head = SimCLRProjectionHead(self._encoder.width, head.hidden_width, head.projection_width).to(
            share.device
        )
        self._loss = NTXentLoss(temperature=head.temperature.value)
        self._pictures = _Pictures(source, _WAITING * setting.batch)

    def run(self) -> float:
        """Images a second, once the workers have batches waiting."""
        loader = DataLoader(self._pictures, self._setting.batch, shuffle=True, drop_last=True, num_workers=_WORKERS)
        parameters = [*self._encoder.parameters(), *self._head.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.06, momentum=0.9, weight_decay=1e-4)
        batches: Iterator[list[Tensor]] = iter(loader)
        for _ in range(_WAITING):
            self._step(next(batches), optimizer)
        began = now(self._device)
        for views in batches:
            self._step(views, optimizer)
        return self._setting.steps * self._setting.batch / (now(self._device) - began)

    def _step(self, views: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
        first, second = (self._head(self._encoder(view.to(self._device))) for view in views)
        loss = self._loss(first, second)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    run(measure, __doc__)
