"""Every pretext task against the same method written with lightly's parts: kNN on ``val`` after ten epochs.

Both sides start from the same encoder's weights and see the same views in the same order, with the same optimizer; head widths,
temperatures and momentum are equal. What differs is the task's own code: losses, memories, teachers. ``--rounds`` is the number
of seeds.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable

import torch
from lightly import loss as lightly_loss
from lightly.models.modules import NNMemoryBankModule, heads
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

from ssl_pipeline.config.command import load
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.loader import IndexedLoader
from ssl_pipeline.engine.distributed import dist_info, start_accelerator
from ssl_pipeline.engine.loop import fit
from ssl_pipeline.engine.optim import build_optimizer
from ssl_pipeline.engine.task import Embeddings, StepOutput, Task
from ssl_pipeline.engine.train_state import TrainState
from ssl_pipeline.evaluation.online import OnlineEvaluation
from ssl_pipeline.models.ema import EMAMomentumConfig
from ssl_pipeline.models.encoder import Encoder, EncoderSpec
from ssl_pipeline.pretext._base import forward_views
from ssl_pipeline.pretrain_config import PretrainConfig
from ssl_pipeline.rng import derive_seed
from ssl_pipeline.transforms.multi_view import Views
from ssl_pipeline.transforms.preprocessing import Preprocessing
from tests.benchmarks.command import run

HIDDEN, WIDTH, QUEUE, PROTOTYPES = 512, 128, 2048, 256
_MOMENTUM = EMAMomentumConfig(start=0.99)
_COMMON = [
    "transform.size=28", "transform.crop.scale=[0.5,1.0]", "transform.color_jitter.brightness=0.8", "transform.color_jitter.contrast=0.8",
    "transform.gaussian_blur.probability=0.5", "transform.gaussian_blur.sigma=[0.1,1.0]", "backbone.stem=imagenet", "epochs=10", "batch_size=256",
]  # fmt: skip
_PREDICTOR = [f"pretext.predictor_width={HIDDEN}", "pretext.momentum.start=0.99"]
_OURS: dict[str, list[str]] = {
    "simclr": ["pretext.temperature.value=0.1"],
    "dcl": ["pretext.temperature.value=0.1"],
    "dclw": ["pretext.temperature.value=0.1"],
    "moco_v2": [
        "pretext.temperature.value=0.1", f"pretext.queue={QUEUE}", "pretext.momentum.start=0.99", "pretext.momentum.end=1.0",
        "pretext.batch_norm_group=null",
    ],
    "nnclr": [
        "pretext.temperature.value=0.1", f"pretext.queue={QUEUE}", f"pretext.predictor_width={HIDDEN}",
        f"pretext.projection_width={WIDTH}",
    ],
    "byol": [*_PREDICTOR, f"pretext.projection_width={WIDTH}"],
    "simsiam": [f"pretext.predictor_width={WIDTH // 2}", f"pretext.projection_width={HIDDEN}"],
    "barlow_twins": [f"pretext.projection_width={HIDDEN}"],
    "vicreg": [f"pretext.projection_width={HIDDEN}"],
    "swav": [f"pretext.prototypes={PROTOTYPES}", "pretext.freeze_prototypes=0 steps"],
    "dino": [
        f"pretext.prototypes={4 * PROTOTYPES}", f"pretext.bottleneck_width={WIDTH}", "pretext.momentum.start=0.99",
        "pretext.freeze_prototypes=0 steps",
    ],
}  # fmt: skip


def measure(rounds: int) -> dict[str, float]:
    """Mean kNN accuracies in per cent, and the differences ours − lightly's in points."""
    accelerator = start_accelerator()
    share = dist_info(accelerator)
    figures: dict[str, float] = {}

    def knn(name: str, seed: int, build: Callable[[Encoder, IndexedDataset], Task] | None) -> float:
        """On `val`, after a short pretraining of a task: ours, or what ``build`` makes of lightly's parts."""
        config = load(
            "pretrain",
            PretrainConfig,
            [*_COMMON, *_OURS[name], f"pretext={name}", f"pretext.hidden_width={HIDDEN}", f"seed={seed}"],
        )
        train, val = config.data.open("train"), config.data.open("val")
        assert train is not None
        assert train.mean is not None
        assert train.std is not None
        torch.manual_seed(derive_seed(seed, "initialisation"))
        blueprint = EncoderSpec(
            backbone=config.backbone, neck=config.neck, channels=train.channels, size=config.transform.size,
            mean=train.mean, std=train.std,
        )  # fmt: skip
        encoder, _ = blueprint.build()
        task = (build or config.pretext.build)(encoder, train)
        task = task.to(share.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        views = Views(config.transform.for_channels(train.channels)[0], train.mean, train.std, seed)
        batches = IndexedLoader(train, views, config.batch_size, seed, share, config.total_steps(len(train)))
        optimizer = build_optimizer(config.optim, task, config.batch_size)
        fit(TrainState(task, optimizer, config.optim, accelerator), batches)
        accelerator.free_memory()
        preprocessing = Preprocessing(config.transform.size, train.mean, train.std)
        return 100 * OnlineEvaluation(train, val, views, preprocessing, share)(encoder)["eval/knn"]

    for name, lightlys in _LIGHTLY.items():
        ours = [knn(name, seed, None) for seed in range(rounds)]
        theirs = [knn(name, seed, lambda encoder, _, build=lightlys: build(encoder)) for seed in range(rounds)]  # type: ignore[misc]
        progress = ", ".join(f"{one:.1f} against {other:.1f}" for one, other in zip(ours, theirs, strict=True))
        sys.stdout.write(f"{name}: {progress}\n")
        sys.stdout.flush()
        figures[f"pretext.{name}.knn"] = statistics.mean(ours)
        figures[f"pretext.{name}.lightly_knn"] = statistics.mean(theirs)
        figures[f"pretext.{name}.difference"] = statistics.mean(ours) - statistics.mean(theirs)
    return figures


class _TwoViews(Task):
    """A head of lightly's on the encoder, and a loss of lightly's on its rows of the two views."""

    def __init__(self, encoder: Encoder, head: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head, self.loss = encoder, head, loss

    def project(self, images: Tensor) -> Tensor:
        rows: Tensor = self.head(self.encoder.features(images))
        return rows

    def embed(self, batch: Batch) -> Embeddings:
        """Both views as one batch."""
        first, second = forward_views(self.project, batch.views)
        return {"first": first, "second": second}

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        """Lightly's loss."""
        del batch
        return StepOutput(self.loss(embeddings["first"], embeddings["second"]))


class _MoCo(_TwoViews):
    def __init__(self, encoder: Encoder) -> None:
        loss = lightly_loss.NTXentLoss(0.1, memory_bank_size=(QUEUE, WIDTH))
        super().__init__(encoder, heads.MoCoProjectionHead(encoder.width, HIDDEN, WIDTH), loss)
        self.slow_encoder, self.slow_head = copy.deepcopy(encoder), copy.deepcopy(self.head)
        deactivate_requires_grad(self.slow_encoder)
        deactivate_requires_grad(self.slow_head)

    def embed(self, batch: Batch) -> Embeddings:
        """The query of the first view, the key of the second."""
        with torch.no_grad():
            key = self.slow_head(self.slow_encoder.features(batch.views[1]))
        return {"first": self.project(batch.views[0]), "second": key}

    def after_step(self, batch: Batch) -> None:
        """The slow copies follow."""
        momentum = _MOMENTUM.at(batch.clock)
        update_momentum(self.encoder, self.slow_encoder, momentum)
        update_momentum(self.head, self.slow_head, momentum)


class _BYOL(_TwoViews):
    def __init__(self, encoder: Encoder) -> None:
        head = heads.BYOLProjectionHead(encoder.width, HIDDEN, WIDTH)
        super().__init__(encoder, head, lightly_loss.NegativeCosineSimilarity())
        self.predictor = heads.BYOLPredictionHead(WIDTH, HIDDEN, WIDTH)
        self.slow_encoder, self.slow_head = copy.deepcopy(encoder), copy.deepcopy(head)
        deactivate_requires_grad(self.slow_encoder)
        deactivate_requires_grad(self.slow_head)

    def embed(self, batch: Batch) -> Embeddings:
        """Predictions and targets of both views."""
        predictions = forward_views(lambda images: self.predictor(self.project(images)), batch.views)
        with torch.no_grad():
            targets = forward_views(lambda images: self.slow_head(self.slow_encoder.features(images)), batch.views)
        return {"first": torch.cat(predictions), "second": torch.cat(targets[::-1])}

    def after_step(self, batch: Batch) -> None:
        """The slow copies follow."""
        momentum = _MOMENTUM.at(batch.clock)
        update_momentum(self.encoder, self.slow_encoder, momentum)
        update_momentum(self.head, self.slow_head, momentum)


class _SimSiam(_TwoViews):
    def __init__(self, encoder: Encoder) -> None:
        head = heads.SimSiamProjectionHead(encoder.width, HIDDEN, HIDDEN)
        super().__init__(encoder, head, lightly_loss.NegativeCosineSimilarity())
        self.predictor = heads.SimSiamPredictionHead(HIDDEN, WIDTH // 2, HIDDEN)

    def embed(self, batch: Batch) -> Embeddings:
        """Predictions, and the other views' projections without gradients."""
        projections = forward_views(self.project, batch.views)
        return {"first": self.predictor(torch.cat(projections)), "second": torch.cat(projections[::-1]).detach()}


class _NNCLR(_TwoViews):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder, heads.NNCLRProjectionHead(encoder.width, HIDDEN, WIDTH), lightly_loss.NTXentLoss(0.1))
        self.predictor = heads.NNCLRPredictionHead(WIDTH, HIDDEN, WIDTH)
        self.memory = NNMemoryBankModule(size=(QUEUE, WIDTH))

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        """As in lightly's example: neighbors against the other view's predictions."""
        del batch
        projections = [embeddings["first"], embeddings["second"]]
        predictions = self.predictor(torch.cat(projections)).chunk(2)
        neighbors = [self.memory(rows.detach(), update=bool(i)) for i, rows in enumerate(projections)]
        ways = [self.loss(neighbors[i], predictions[1 - i]) for i in (0, 1)]
        return StepOutput(torch.stack(ways).mean())


class _SwAV(_TwoViews):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder, heads.SwaVProjectionHead(encoder.width, HIDDEN, WIDTH), lightly_loss.SwaVLoss())
        self.prototypes = heads.SwaVPrototypes(WIDTH, PROTOTYPES)

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        """Scores of unit rows against unit prototypes."""
        del batch
        self.prototypes.normalize()
        scores = [self.prototypes(nn.functional.normalize(rows, dim=1)) for rows in embeddings.values()]
        return StepOutput(self.loss(scores, []).squeeze())


class _DINO(_TwoViews):
    def __init__(self, encoder: Encoder) -> None:
        def head() -> heads.ProjectionHead:
            return heads.DINOProjectionHead(encoder.width, HIDDEN, WIDTH, 4 * PROTOTYPES)

        super().__init__(encoder, head(), lightly_loss.DINOLoss(4 * PROTOTYPES))
        # lightly's head can't be copied (its weight norm is no leaf): a second one takes the weights over.
        self.slow_encoder, self.slow_head = copy.deepcopy(encoder), head()
        self.slow_head.load_state_dict(self.head.state_dict())
        deactivate_requires_grad(self.slow_encoder)
        deactivate_requires_grad(self.slow_head)

    def embed(self, batch: Batch) -> Embeddings:
        """Answers and targets of both views."""
        answers = forward_views(self.project, batch.views)
        with torch.no_grad():
            targets = forward_views(lambda images: self.slow_head(self.slow_encoder.features(images)), batch.views)
        return {"answer 0": answers[0], "answer 1": answers[1], "target 0": targets[0], "target 1": targets[1]}

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        """Lightly's loss."""
        del batch
        rows = list(embeddings.values())
        return StepOutput(self.loss(rows[2:], rows[:2]))

    def after_step(self, batch: Batch) -> None:
        """The slow copies follow."""
        momentum = _MOMENTUM.at(batch.clock)
        update_momentum(self.encoder, self.slow_encoder, momentum)
        update_momentum(self.head, self.slow_head, momentum)


_LIGHTLY: dict[str, Callable[[Encoder], Task]] = {
    "simclr": lambda e: _TwoViews(e, heads.SimCLRProjectionHead(e.width, HIDDEN, WIDTH), lightly_loss.NTXentLoss(0.1)),
    "dcl": lambda e: _TwoViews(e, heads.SimCLRProjectionHead(e.width, HIDDEN, WIDTH), lightly_loss.DCLLoss(0.1)),
    "dclw": lambda e: _TwoViews(e, heads.SimCLRProjectionHead(e.width, HIDDEN, WIDTH), lightly_loss.DCLWLoss(0.1)),
    "moco_v2": _MoCo,
    "nnclr": _NNCLR,
    "byol": _BYOL,
    "simsiam": _SimSiam,
    "barlow_twins": lambda e: _TwoViews(
        e, heads.BarlowTwinsProjectionHead(e.width, HIDDEN, HIDDEN), lightly_loss.BarlowTwinsLoss()
    ),
    "vicreg": lambda e: _TwoViews(
        e, heads.VICRegProjectionHead(e.width, HIDDEN, HIDDEN, num_layers=3), lightly_loss.VICRegLoss()
    ),
    "swav": _SwAV,
    "dino": _DINO,
}


if __name__ == "__main__":
    run(measure, __doc__)
