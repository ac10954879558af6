"""The configuration of stage one, and what in it can't go together with the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from ssl_pipeline.config.base import ComponentOf, ConfigError
from ssl_pipeline.data.dataset import ImageDataset
from ssl_pipeline.data.source import SourceConfig
from ssl_pipeline.engine.optim import OptimConfig
from ssl_pipeline.engine.run import RunConfig
from ssl_pipeline.engine.task import PretextConfig
from ssl_pipeline.models.backbone import Backbone, BackboneConfig
from ssl_pipeline.models.neck import NeckConfig
from ssl_pipeline.schedules import Duration, parse_duration
from ssl_pipeline.transforms.config import ViewsConfig


class PretrainConfig(RunConfig):
    """The configuration of stage one; each field's model says what its keys mean.

    Attributes:
        data: what to learn from.
        transform: how an image becomes its random views.
        backbone: the network that learns.
        neck: what makes one row of features of the backbone's maps.
        pretext: the pretext task.
        optim: optimizer and schedule.
        batch_size: images of a step over all processes; where there are fewer, the largest batch that they make, which is logged.
        micro_batch_size: images that a process embeds at once: GradCache (``engine/train_state.py``) gives the gradient of the whole
            batch at the memory of a small one. By default a process's whole share.
        epochs: the run's length.
        steps: a length in optimizer steps instead.
        evaluate_every: how often kNN and the signs of collapse are measured; ``0 steps`` at the end only.
        log_every: optimizer steps from one line of metrics to the next.
    """

    wins_over: ClassVar[Mapping[str, str]] = {"steps": "epochs"}
    data: Annotated[SourceConfig, ComponentOf("data.sources")]
    transform: ViewsConfig
    backbone: BackboneConfig
    neck: NeckConfig
    pretext: Annotated[PretextConfig, ComponentOf("pretext")]
    optim: OptimConfig
    batch_size: int = Field(256, ge=2)
    micro_batch_size: int | None = Field(None, ge=2)
    epochs: int = Field(100, ge=1)
    steps: int | None = Field(None, ge=1)
    evaluate_every: Duration = parse_duration("10%")
    log_every: int = Field(10, ge=1)

    def total_steps(self, samples: int | None) -> int:
        """The run's length in optimizer steps; of an unknown number of samples ``steps`` must be given."""
        return self.steps or self.epochs * ((samples or 0) // self.batch_size)

    def fit_batch(self, train: ImageDataset, processes: int) -> tuple[PretrainConfig, list[str]]:
        """Takes the largest batch that the images suffice for and that processes and micro-batches share evenly.

        Returns:
            The configuration with that batch, and a note where it differs.
        """
        asked, samples = self.micro_batch_size, train.length
        if samples is None or self.batch_size <= samples:
            return self, []
        micro = asked if asked is not None and asked * processes <= samples else None
        unit = (micro or 1) * processes
        size = samples // unit * unit
        if size < 2 * processes:
            return self, []  # `check` refuses that
        dropped = f", and micro_batch_size={asked} is more than a process has and left out" if micro != asked else ""
        note = f"batch_size={size} instead of {self.batch_size}: {train.name} has only {samples} images to train on{dropped}"
        return self.model_copy(update={"batch_size": size, "micro_batch_size": micro}), [note]

    def check(self, train: ImageDataset, processes: int) -> None:
        """Refuses what can't go together, all of it at once, before anything is written.

        Raises:
            ConfigError: naming each impossible pair.
        """
        problems = []
        size, samples = self.batch_size, train.length
        total = self.total_steps(samples)
        if samples is None and self.steps is None:
            problems.append(f"{train.name} has no known length: give the run's length by `steps`, or `data.length`.")
        elif samples is not None and size > samples:
            problems.append(
                f"{train.name} has only {samples} images to train on, and each of {processes} process(es) needs 2 in a step: give more."
            )
        elif self.optim.warmup.steps(total if samples is None else samples // size, total) > total:
            problems.append(f"`optim.warmup` of {self.optim.warmup} is longer than the run of {total} steps.")
        if size % processes:
            problems.append(f"`batch_size` of {size} can't be shared evenly by {processes} processes: take a multiple.")
        elif self.micro_batch_size is not None and size // processes % self.micro_batch_size:
            problems.append(
                f"`micro_batch_size` of {self.micro_batch_size} does not divide the {size // processes} images of a process: take a divisor."
            )
        needed = self.pretext.views_needed
        if needed is not None and self.transform.num_views != needed:
            problems.append(
                f"`transform.num_views` is {self.transform.num_views}, and {self.pretext.name} needs {needed}."
            )
        local = self.transform.local_views
        if local.count and not self.pretext.takes_local_views:
            problems.append(
                f"`transform.local_views.count` is {local.count}, and {self.pretext.name} takes no local views: set it to 0."
            )
        if problems:
            raise ConfigError(problems)

    def check_local_views(self, backbone: Backbone) -> None:
        """Refuses local views where the backbone is bound to another size.

        Raises:
            ConfigError: naming the backbone and its size.
        """
        local = self.transform.local_views
        if local.count and backbone.fixed_input not in (None, local.size):
            raise ConfigError(
                f"`transform.local_views` needs a backbone that takes images of any size, and {self.backbone.name} is bound to {backbone.fixed_input} px: "
                f"take a convolutional one, or transform.local_views.size={backbone.fixed_input}."
            )
