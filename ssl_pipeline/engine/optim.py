"""Optimizers by name, the rate of every step, and which parameters decay."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightly.utils.lars import LARS
from pydantic import Field, model_validator
from torch.optim import SGD, AdamW, Optimizer

from ssl_pipeline.engine.nonfinite import NonFiniteConfig
from ssl_pipeline.engine.task import Task
from ssl_pipeline.schedules import WarmupCosine


class OptimConfig(WarmupCosine):
    """The optimizer and its learning rate over the run.

    Attributes:
        name: ``sgd``, ``lars`` or ``adamw``.
        lr: the base rate; with ``scaling: linear`` it is meant for a global batch of 256.
        scaling: ``linear``: rate = lr · global batch ÷ 256 (Goyal et al. 2017); ``none``: rate = lr.
        weight_decay: not applied to norms, biases and other one-dimensional parameters.
        momentum: of SGD and LARS.
        betas: of AdamW.
        trust_coefficient: LARS' trust coefficient (You et al. 2017).
        grad_clip_norm: the gradient's greatest norm; none by default.
        nonfinite: what is done at a step whose loss or gradient is not finite.
    """

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    lr: float = Field(0.06, gt=0)
    scaling: Literal["linear", "none"] = "linear"
    weight_decay: float = Field(1e-4, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.999)
    trust_coefficient: float = Field(0.001, gt=0)
    grad_clip_norm: float | None = Field(None, gt=0)
    nonfinite: NonFiniteConfig = NonFiniteConfig()

    @model_validator(mode="after")
    def _lars_needs_decay(self) -> OptimConfig:
        if self.name == "lars" and self.weight_decay == 0:
            raise ValueError(
                "LARS scales only parameters that decay: with weight_decay 0 it is plain SGD; set it above 0."
            )
        return self

    def peak_rate(self, batch_size: int) -> float:
        """The rate after warm-up for a global batch."""
        return self.lr * batch_size / 256 if self.scaling == "linear" else self.lr


def build_optimizer(config: OptimConfig, task: Task, batch_size: int) -> Optimizer:
    """The optimizer of a task, for a ``batch_size`` over all processes.

    Its groups carry ``base_lr``; :meth:`OptimConfig.set_lr` makes the step's rate of it. Norms and biases are in groups of their own
    without decay, which LARS therefore also leaves unscaled.
    """
    groups: list[dict[str, Any]] = []
    for group in task.param_groups():
        rate = config.peak_rate(batch_size) * group["lr_factor"]
        named: list[tuple[str, torch.nn.Parameter]] = list(group["params"])
        for decays in (True, False):
            members = [parameter for _, parameter in named if (parameter.ndim > 1) == decays]
            if members:
                decay = config.weight_decay if decays else 0.0
                groups.append({"params": members, "lr": rate, "base_lr": rate, "weight_decay": decay})
    if config.name == "adamw":
        return AdamW(groups, betas=config.betas)
    if config.name == "lars":
        lars: Optimizer = LARS(
            groups, lr=config.lr, momentum=config.momentum, trust_coefficient=config.trust_coefficient
        )
        return lars
    return SGD(groups, lr=config.lr, momentum=config.momentum)
