"""What a step of each adaptation method costs, as a multiple of source-only's at the same number of images.

Small ResNet, embedded domains, views and all; the methods alternate. A joint batch has its images from source and target, half
and half, where source-only has them all from the source. What a method does once (a memory filled, statistics estimated
anew) stands outside of its steps.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from ssl_pipeline.config.command import load
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import DistInfo, IndexedLoader
from ssl_pipeline.data.paired import PairedLoader
from ssl_pipeline.domain.method import Method
from ssl_pipeline.downstream.classification import Classification
from ssl_pipeline.engine.distributed import dist_info, move_to_device, start_accelerator
from ssl_pipeline.engine.optim import build_optimizer
from ssl_pipeline.evaluation.features import extract
from ssl_pipeline.finetune import open_start
from ssl_pipeline.finetune_config import FinetuneConfig
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing
from tests.benchmarks.clock import now
from tests.benchmarks.command import run

_METHODS = (
    "source_only", "adabn", "coral", "dann", "mmd", "mcc", "information_maximization", "shot_im", "exemplar_memory", "dance",
)  # fmt: skip
_IMAGES, _STEPS = 64, 12


@dataclass(frozen=True)
class Side:
    """A method, ready to take steps.

    Attributes:
        task: on its device.
        batches: of its last phase.
        optimizer: of its parameters.
    """

    task: Method
    batches: IndexedLoader
    optimizer: torch.optim.Optimizer

    def seconds(self, device: torch.device) -> float:
        """Of some steps, the first of which is not counted."""
        self.task.train()
        began = 0.0
        for place, batch in enumerate(self.batches.from_step(0)):
            if place == 1:
                began = now(device)
            self.task(batch).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.task.after_step(batch)
        return now(device) - began


def measure(rounds: int) -> dict[str, float]:
    """Medians over the rounds of each method's time ÷ source-only's in the same round."""
    share = dist_info(start_accelerator())
    sides = {name: _side(name, share) for name in _METHODS}
    ratios: dict[str, list[float]] = {name: [] for name in _METHODS[1:]}
    for _ in range(rounds):
        base = sides["source_only"].seconds(share.device)
        for name in ratios:
            ratios[name].append(sides[name].seconds(share.device) / base)
    figures = {f"adaptation.step_ratio_{name}": statistics.median(values) for name, values in ratios.items()}
    return figures | {"adaptation.worst_step_ratio": max(figures.values())}


def _side(name: str, share: DistInfo) -> Side:
    config = load(
        "finetune", FinetuneConfig,
        [
            "data=fashion_domains", "data.domains=[original,textured]", "domain.source=[original]", "domain.target=[textured]",
            f"domain={name}", "regime=scratch", "tracking=off",
        ],
    )  # fmt: skip
    method, pool = config.domain, config.data.open("train")
    assert method is not None
    assert pool is not None
    source, target = _domain(pool, 0), _domain(pool, 1)
    target.labels = None
    torch.manual_seed(0)
    blueprint = open_start(config, pool).spec
    classifier = config.downstream.build(blueprint.build()[0], len(pool.classes or ()))
    assert isinstance(classifier, Classification)
    task = move_to_device(method.build(classifier, target), share)
    policy, _ = config.transform.model_copy(update={"size": blueprint.size}).for_channels(pool.channels)
    ours, theirs = (Views(policy, blueprint.mean, blueprint.std, seed) for seed in (0, 1))
    batches: IndexedLoader
    if method.phases[-1] == "joint":
        batches = PairedLoader(source, target, ours, theirs, _IMAGES // 2, 0, share, _STEPS + 1)
    else:
        side = target if method.phases[-1] == "target" else source
        batches = IndexedLoader(side, ours, _IMAGES, 0, share, _STEPS + 1, with_labels=side is source)
    preprocessing = Preprocessing.of(blueprint)
    task.prime(lambda forward: extract(task, target, preprocessing, share, forward=forward))
    return Side(task, batches, build_optimizer(config.regime.optim, task, _IMAGES))


def _domain(pool: IndexedDataset, number: int) -> IndexedDataset:
    assert pool.domains is not None
    return pool.select((pool.domains == number).nonzero()[:, 0])


if __name__ == "__main__":
    run(measure, __doc__)
