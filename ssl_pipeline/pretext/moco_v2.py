"""MoCo v2: a view against a slowly moving encoder's view of the same image, and a long queue of older ones.

    ℓ(q) = −log( exp(q·k₊ ÷ τ) ÷ [exp(q·k₊ ÷ τ) + Σ_{k in queue} exp(q·k ÷ τ)] ),   θₖ ← m θₖ + (1 − m) θ_q

When to use: many negatives at a small batch. The queue is older than the encoder, which the slow key encoder makes
bearable. Chen, Fan et al. 2020, arXiv 2003.04297; He et al. 2020, arXiv 1911.05722, equations 1 and 2.

Rows of one batch share its statistics, by which a query could recognize its key. So BatchNorm normalizes
groups of images, and the keys' groups are drawn anew over the batch of all processes (shuffling BN, He et al. 2020,
section 3.3). SyncBatchNorm does not take its place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.batch import Batch
from ssl_pipeline.data.dataset import ImageDataset
from ssl_pipeline.engine.task import Embeddings, StepOutput, Task
from ssl_pipeline.losses.gather import all_gather_ids, all_gather_rows, rank_and_world_size
from ssl_pipeline.losses.info_nce import Match, info_nce
from ssl_pipeline.losses.memory_bank import MemoryQueue
from ssl_pipeline.losses.temperature import temperature_metrics
from ssl_pipeline.models.batch_norm import norms_with_statistics
from ssl_pipeline.models.ema import EMAModel, EMAMomentumConfig
from ssl_pipeline.models.encoder import Encoder
from ssl_pipeline.pretext._base import ContrastiveConfig, ProjectionTask, forward_views
from ssl_pipeline.rng import permutation


class MoCoV2(ProjectionTask):
    """See :class:`Config`. In micro-batches (``micro_batch_size``) the keys are shuffled within each of them."""

    config: Config

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(config, encoder, norm=False)
        self.group = config.batch_norm_group
        self.teacher = EMAModel(self.student())
        self.queue = MemoryQueue(config.queue, config.projection_width)
        self.synchronizes_norms = self.group is None
        self._keys: list[Tensor] = []

    def embed(self, batch: Batch) -> Embeddings:
        first, second = batch.views
        views = [(first, second), (second, first)] if self.config.symmetric else [(first, second)]
        if self.group is not None and any(norm.training for norm in norms_with_statistics(self.teacher)):
            queries = [in_groups(self.project, query, self.group) for query, _ in views]
            keys = [self._shuffled_keys(key, self.group, batch.clock.step) for _, key in views]
        else:
            queries = forward_views(self.project, [query for query, _ in views])
            keys = forward_views(self.teacher, [key for _, key in views])
        return {f"query {i}": q for i, q in enumerate(queries)} | {f"key {i}": k for i, k in enumerate(keys)}

    @torch.no_grad()
    def _shuffled_keys(self, images: Tensor, group: int, step: int) -> Tensor:
        """The keys of this process's images, in groups that are drawn from the images of all processes."""
        rank, _ = rank_and_world_size()
        own = slice(rank * len(images), (rank + 1) * len(images))
        every = all_gather_rows(images.contiguous())
        order = permutation(len(every), "shuffled keys", step).to(images.device)
        keys = all_gather_rows(in_groups(self.teacher, every[order[own]], group))
        return keys[order.argsort()[own]]

    def objective(self, embeddings: Embeddings, batch: Batch) -> StepOutput:
        temperature = self.temperature(batch.clock)
        ways = range(2 if self.config.symmetric else 1)
        queries = [embeddings[f"query {i}"] for i in ways]
        self._keys = [embeddings[f"key {i}"].detach() for i in ways]
        contrasts = [self._contrast(keys, batch) for keys in self._keys]
        losses = [
            info_nce(rows, keys, positive, temperature, left_out=left_out)
            for rows, (keys, positive, left_out) in zip(queries, contrasts, strict=True)
        ]
        keys, positive, _ = contrasts[0]
        details = partial(temperature_metrics, queries[0].detach(), keys, positive, temperature)
        return StepOutput(torch.stack(losses).mean(), {"temperature": temperature, "queue": len(self.queue)}, details)

    def _contrast(self, keys: Tensor, batch: Batch) -> tuple[Tensor, Match, list[Match]]:
        """The keys, which of them are positives, and which are no candidates."""
        rank, _ = rank_and_world_size()
        older, older_samples = self.queue.keys()
        keys = all_gather_rows(keys)
        place = torch.arange(len(batch.index), device=keys.device) + rank * len(batch.index)
        all_places = torch.arange(len(keys), device=keys.device)
        positive = place, torch.cat([all_places, torch.full_like(older_samples, -1)])
        # A query's candidates are its own key and the queue, not the batch's other keys: they share an id with all queries.
        in_batch = torch.zeros_like(place), torch.cat([torch.zeros_like(all_places), torch.ones_like(older_samples)])
        # Before the queue has rows, the other keys are all there is.
        left_out = [in_batch] if len(older) else []
        if self.config.leave_out_same_sample:
            left_out.append((batch.index, torch.cat([all_gather_ids(batch.index), older_samples])))
        return torch.cat([keys, older]), positive, left_out

    def after_step(self, batch: Batch) -> None:
        self.temperature.clamp()
        self.teacher.follow(self.student(), self.config.momentum.at(batch.clock))
        for keys in self._keys:
            self.queue.push(keys, batch.index)
        self._keys = []


def in_groups(network: Callable[[Tensor], Tensor], images: Tensor, group: int) -> Tensor:
    """Images (B, C, H, W) to rows (B, D) in even groups of about ``group``, each with batch statistics of its own.

    A process that is alone makes two groups at least: one has nothing to shuffle.
    """
    least = 2 if rank_and_world_size()[1] == 1 else 1
    count = max(1, min(max(least, len(images) // group), len(images) // 2))
    return torch.cat([network(part) for part in images.tensor_split(count)])


class Config(ContrastiveConfig):
    """MoCo v2 (Chen, Fan et al. 2020).

    Attributes:
        queue: keys that are kept.
        momentum: of the key encoder.
        symmetric: whether each view is a query once (as in "MoCo v2+"), or the first alone.
        leave_out_same_sample: whether older keys of the query's own image are no negatives.
        batch_norm_group: images that BatchNorm takes its statistics from together, 32 as on each GPU of the paper; the keys' groups
            are shuffled. One process makes two groups at least. Null: of the whole batch, over all GPUs, and nothing is shuffled.
    """

    task = MoCoV2
    contrasts_with = "a queue without domains"
    queue: int = Field(65536, ge=1)
    momentum: EMAMomentumConfig = EMAMomentumConfig(start=0.999, end=0.999)
    symmetric: bool = False
    leave_out_same_sample: bool = True
    batch_norm_group: int | None = Field(32, ge=2)

    def build(self, encoder: Encoder, source: ImageDataset) -> Task:
        samples = source.length
        if samples is not None and self.queue > samples and not self.leave_out_same_sample:
            raise ConfigError(
                f"`pretext.queue` of {self.queue} is longer than the {samples} images of {source.name}: each image would repel "
                "itself. Lower it, or set `pretext.leave_out_same_sample` to true."
            )
        return super().build(encoder, source)
