"""A run that is continued despite another configuration: where it goes on, what is left of it, and how that is said."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.data.loader import TrainLoader
from ssl_pipeline.engine.optim import OptimConfig

_LEAP = 1.25  # a rate that changes by more than this factor from one step to the next is said to leap


def check_steps_left(state: Mapping[str, Any], batches: TrainLoader, in_steps: bool, key: str) -> None:
    """Refuses a change after which a run would end without a step, as if it had been trained; changes nothing.

    Args:
        state: the checkpoint to continue from.
        batches: of the new configuration.
        in_steps: whether its length is given in optimizer steps.
        key: of the length, such as ``epochs``.

    Raises:
        ConfigError: no step is left; or the checkpoint does not say how many samples were seen.
    """
    if "position" not in state:
        raise ConfigError(
            "the checkpoint is of an earlier version, which did not keep how many samples of its epoch were seen: continue it "
            "without changes by `resume=auto`, or choose another `output=FOLDER`."
        )
    planned = copy.copy(batches)
    step = planned.resume(state["position"], state["done"], in_steps)
    if step < planned.total_steps:
        return
    epoch = step / planned.steps_per_epoch
    longer = 2 * state["done"] if in_steps else max(math.ceil(2 * epoch), math.floor(epoch) + 1)
    raise ConfigError(
        f"nothing is left to train: {state['done']} steps were taken, up to epoch {epoch:.2f}, and this configuration ends at "
        f"step {planned.total_steps + planned.offset} (epoch {planned.total_steps / planned.steps_per_epoch:.2f}). Train longer, such as by "
        f"{key}={longer}, undo the change, or choose another output=FOLDER."
    )


def go_on(state: Mapping[str, Any], batches: TrainLoader, in_steps: bool) -> None:
    """Sets batches to where a checkpoint was; one of an earlier version is of the same batch size, and needs nothing."""
    if "position" in state:
        batches.resume(state["position"], state["done"], in_steps)


def in_words(state: Mapping[str, Any], batches: TrainLoader, optim: OptimConfig) -> str:
    """Epoch and learning rate before and after a change, of batches that were set to go on."""
    clock = batches.clock(state["done"] - batches.offset)
    total = batches.total_steps + batches.offset
    epoch = clock.step / batches.steps_per_epoch
    ends = batches.total_steps / batches.steps_per_epoch
    rate, before = optim.peak_rate(batches.batch_size) * optim.factor(clock), state["rate"]
    leaps = before > 0 and not 1 / _LEAP <= rate / before <= _LEAP
    return (
        f"goes on at epoch {epoch:.2f} of {ends:.2f}, after step {state['done']} of {total}: the learning rate "
        f"{'leaps' if leaps else 'goes'} from {before:.3g} to {rate:.3g}"
    )
