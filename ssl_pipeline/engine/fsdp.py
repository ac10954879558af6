"""Large transformers over several processes by FSDP2: each process holds a share of weights, gradients and optimizer state.

What is sharded is a copy. The caller's task stays whole on every process: evaluators, the best model and the hand-over read
plain tensors, and know nothing of shards. With AdamW in fp32 that is 16 ÷ processes + 4 bytes a parameter, instead of 16.

Weights are gathered in fp32 and cast by autocast, as DistributedDataParallel's are: the same loss, for twice the bytes that
a gather in bf16 would move. A checkpoint is gathered to its plain form: one written here continues under any other launcher.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, recursively_apply
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.engine.task import Task

# What torchvision and timm call the blocks of their transformers.
_BLOCKS = {
    "Block", "EncoderBlock", "EvaBlock", "ResPostBlock", "ParallelScalingBlock", "DiffParallelScalingBlock",
    "SwinTransformerBlock", "SwinTransformerBlockV2", "SwinTransformerV2Block",
}  # fmt: skip
_INSTEAD = "or start it without sharding, by launch/accelerate/gpu_8.yaml."


def check_fsdp_environment() -> None:
    """Refuses, of a launcher that asked for FSDP, its first version, and fp16.

    Raises:
        ConfigError: with the setting to change.
    """
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("sharding is FSDP2's here: set `fsdp_version: 2` in the launcher's `fsdp_config`.")
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise ConfigError("FSDP2 runs in bf16 or fp32 here: set `mixed_precision: bf16` for the launcher.")


def shard_on_cpu(accelerator: Accelerator) -> None:
    """Lets FSDP2 hold on a CPU too, where Accelerate drops it without a word."""
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def check_shardable(task: nn.Module, micro: int | None) -> None:
    """Refuses what FSDP2 can't train; ``micro`` is ``micro_batch_size``.

    Raises:
        ConfigError: naming each obstacle, and what to do.
    """
    problems = []
    if micro is not None:
        problems.append(
            f"`micro_batch_size` goes through the network apart from the task's forward, where FSDP2 gathers no weights: set it to null, "
            f"{_INSTEAD}"
        )
    scalars = [name for name, parameter in task.named_parameters() if parameter.ndim == 0]
    if scalars:
        problems.append(
            f"FSDP2 can't share out a single number, and {', '.join(scalars)} learns one: fix it (for a temperature "
            f"`pretext.temperature.learned=null`, for a neck another `neck`), {_INSTEAD}"
        )
    if not _blocks(task):
        problems.append(
            f"FSDP2 shares a vision transformer out by its blocks, and this backbone has none: take one (vit_b_16, timm/NAME), "
            f"{_INSTEAD}"
        )
    if problems:
        raise ConfigError(problems)


def shard_for_training(task: Task, optimizer: Optimizer, accelerator: Accelerator) -> tuple[Task, Optimizer]:
    """A copy of the task that will be sharded, with its own optimizer.

    Raises:
        ConfigError: see :func:`check_shardable`.
    """
    check_shardable(task, None)
    plugin = accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = sorted(_blocks(task))
    plugin.mixed_precision_policy = None  # Accelerate's would run the heads and the loss's parameters in bf16
    copied: tuple[Task, Optimizer] = copy.deepcopy((task, optimizer))
    return copied


@torch.no_grad()
def copy_full_params(trained: nn.Module, whole: nn.Module) -> None:
    """Gives the whole task what its sharded copy has learned; all processes take part."""
    own = whole.state_dict()
    for key, value in trained.state_dict().items():
        own[key].copy_(value.full_tensor() if isinstance(value, DTensor) else value)


def full_state_dict(tree: Any, keep: bool) -> Any:
    """A state dict in its plain form; all processes take part.

    Shards are put together one tensor at a time, on the CPU; a process that need not ``keep`` the result drops each tensor.
    """

    def whole(shard: DTensor) -> torch.Tensor:
        full = shard.full_tensor()
        return full.cpu() if keep else full.new_empty(0)

    return recursively_apply(whole, tree, test_type=lambda value: isinstance(value, DTensor))


def shard_state_dict(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """A plain optimizer state dict, sharded like the optimizer's parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shares = {}
    for number, entries in state["state"].items():
        parameter = parameters[number]
        shares[number] = {
            name: distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape
            else value
            for name, value in entries.items()
        }
    return {**state, "state": shares}


def _blocks(task: nn.Module) -> set[str]:
    return {type(module).__name__ for module in task.modules()} & _BLOCKS
