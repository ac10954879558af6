"""The configuration of stage two, and what in it can't go together with the data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ssl_pipeline.config.base import ComponentOf, ConfigError
from ssl_pipeline.data.dataset import IndexedDataset
from ssl_pipeline.data.source import SourceConfig, at_range_of
from ssl_pipeline.domain.method import MethodConfig
from ssl_pipeline.downstream.consistency import ConsistencyConfig
from ssl_pipeline.downstream.labels import LabelsConfig
from ssl_pipeline.downstream.regime import RegimeConfig
from ssl_pipeline.downstream.task import DownstreamConfig
from ssl_pipeline.engine.run import RunConfig
from ssl_pipeline.models.backbone import BackboneConfig
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.transforms.config import ViewsConfig


class FinetuneConfig(RunConfig):
    """The configuration of stage two; each field's model says what its keys mean.

    Attributes:
        encoder: a stage-one run's folder, or its ``encoder.safetensors``.
        init: ``random`` takes the same architecture with fresh weights, to compare with.
        size: height and width of the images in pixels; null is those that the encoder was pretrained on.
        data: images with labels.
        transform: mild views for training; measuring uses none.
        backbone: the network if no encoder is given; an encoder has its own.
        neck: how maps become features, if no encoder is given.
        downstream: what the labels are for.
        regime: which layers are trained, and how.
        domain: a method across domains; null trains and measures on all domains together.
        labels: how many labels are used, and how many of them are held out.
        unlabeled: how the other training images are learned from, without labels; null does not use them.
        seeds: repeats with other seeds; results are means with 95 % intervals.
        split: what results are measured on; ``val`` to tune a recipe.
    """

    encoder: str | None = None
    init: Literal["pretrained", "random"] = "pretrained"
    size: int | None = Field(None, ge=8)
    data: Annotated[SourceConfig, ComponentOf("data.sources")]
    transform: ViewsConfig
    backbone: BackboneConfig
    neck: NeckConfig
    downstream: Annotated[DownstreamConfig, ComponentOf("downstream")]
    regime: RegimeConfig
    domain: Annotated[MethodConfig | None, ComponentOf("domain")] = None
    labels: LabelsConfig
    unlabeled: ConsistencyConfig | None = None
    seeds: int = Field(1, ge=1)
    split: Literal["test", "val"] = "test"

    @property
    def starts_fresh(self) -> bool:
        """Whether the encoder's weights are random."""
        return self.init == "random" or self.regime.name == "scratch"

    @property
    def scaled_data(self) -> SourceConfig:
        """The data, at the range of values that the encoder or model was trained at."""
        return at_range_of(self.data, self.encoder or (self.domain.starts_from if self.domain is not None else None))

    def check(self, pool: IndexedDataset, held_out: IndexedDataset | None) -> None:
        """Refuses what can't go together, all of it at once, before anything is written.

        Raises:
            ConfigError: naming each problem.
        """
        problems = self.downstream.check(
            pool, held_out if self.domain is None else None
        ) + self.downstream.check_regime(self.regime.name)
        if not problems and held_out is None:
            problems.append(f"{pool.name} has no `{self.split}` split to measure on: see its keys in `configs/data`.")
        starts_from = self.domain.starts_from if self.domain is not None else None
        if starts_from is not None and (self.encoder is not None or self.starts_fresh):
            problems.append(
                "`domain.model` brings its own encoder: leave `encoder` out, and take regime lp_ft or end_to_end."
            )
        elif starts_from is None and self.encoder is None and self.backbone.weights is None and not self.starts_fresh:
            problems.append("`encoder` is required: the folder of a stage-one run (or give `backbone.weights`).")
        if self.regime.freeze_bn_stats and self.starts_fresh:
            problems.append(
                "`regime.freeze_bn_stats` keeps what stage one has estimated, and fresh weights have no such: set it to false."
            )
        problems += self.downstream.check_views(self.transform)
        if self.domain is not None:
            problems += self.domain.check(self.downstream, self.regime)
            problems += self.data.shown_by_views(self.transform.each(), self.domain.target)
        if self.unlabeled is not None:
            across = self.domain is not None
            problems += self.unlabeled.check(self.downstream.name, self.regime.name, across, pool)
        if self.transform.num_views != 1:
            problems.append(f"`transform.num_views` is {self.transform.num_views}, and stage two needs 1.")
        if self.transform.amplitude_mix.probability:
            problems.append(
                "`transform.amplitude_mix` is for stage one: set its probability to 0 (`domain=exemplar_memory` restyles)."
            )
        if self.transform.local_views.count:
            problems.append(
                f"`transform.local_views.count` is {self.transform.local_views.count}, and stage two takes no local views."
            )
        if problems:
            raise ConfigError(problems)
