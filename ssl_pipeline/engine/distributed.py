"""One process or many: the accelerator, and what processes exchange outside of a step."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from torch import nn

from ssl_pipeline.config.base import ConfigError, UserError
from ssl_pipeline.config.timeout import timeout_seconds
from ssl_pipeline.data.loader import DistInfo
from ssl_pipeline.engine.failures import NEVER, watch_group
from ssl_pipeline.engine.fsdp import check_fsdp_environment, shard_on_cpu
from ssl_pipeline.logging.progress import silence_other_ranks

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
_FIRST_STEP_OF_A_JOBS_OWN = 0xFFFFFFF0  # the steps of a job's script and shell have numbers from the end of 32 bits
_TASKS_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def start_accelerator() -> Accelerator:
    """The accelerator of this process; the launcher decides precision and processes.

    Raises:
        ConfigError: the launcher was asked for several processes, which did not become one group, or for sharding that is not
            supported.
    """
    problem = without_launcher(os.environ)
    if problem is not None:
        raise ConfigError(problem)
    cpu, sharded = not torch.cuda.is_available(), os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if sharded:
        check_fsdp_environment()
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision is None and not cpu and torch.cuda.is_bf16_supported():
        precision = "bf16"
    # Buffers are not sent at every step: a memory is the same everywhere, and statistics are agreed on where they are read.
    kwargs = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    of_group = int(os.environ.get("WORLD_SIZE", "1"))
    if cpu and of_group > 1 and not is_initialized():
        watch_group()
    patience = InitProcessGroupKwargs(timeout=NEVER if cpu else timedelta(seconds=timeout_seconds()))
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=[kwargs, patience])
    silence_other_ranks(accelerator.is_main_process)
    asked = max(of_group, _processes_asked_of_launcher())
    if asked != accelerator.num_processes:
        raise ConfigError(
            f"{asked} processes were asked for, and {accelerator.num_processes} came as one group: on a CPU use "
            "`accelerate launch --config_file launch/accelerate/cpu_2.yaml`, on GPUs check `nvidia-smi` and --num_processes."
        )
    if sharded:
        shard_on_cpu(accelerator)
    return accelerator


def without_launcher(environment: Mapping[str, str]) -> str | None:
    """What is wrong where `srun` or `mpirun` started several processes that would each do the same run; None if nothing is.

    A shell of `salloc`, and a script of `sbatch`, also know the job's number of tasks, and are one process: what counts is the
    step that this process belongs to.
    """
    if "WORLD_SIZE" in environment:  # set by torch's launchers
        return None
    job, step = (_number(environment, name) for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"))
    in_step = (
        0 <= _number(environment, "SLURM_STEP_ID", -1) < _FIRST_STEP_OF_A_JOBS_OWN
        or _number(environment, "SLURM_PROCID") > 0
    )
    tasks, starter = step or (job if in_step else 0), "srun"
    if tasks <= 1:
        tasks, starter = max(_number(environment, name) for name in _TASKS_OF_MPI), "mpirun"
        tasks = 0 if "MASTER_ADDR" in environment else tasks  # Accelerate makes a group of them
    if tasks <= 1:
        return None
    return (
        f"`{starter}` has started {tasks} processes that know nothing of each other, and each would do the same run. For one run on "
        f"several processes start one launcher on each machine: `{starter} -n 1 launch/run --num_processes {tasks} pretrain …` (see "
        "launch/slurm). For one process give `-n 1`. For separate runs, each with an `output` of its own, set WORLD_SIZE=1."
    )


def dist_info(accelerator: Accelerator) -> DistInfo:
    """This process's rank and device, and the number of processes."""
    return DistInfo(accelerator.process_index, accelerator.num_processes, accelerator.device)


def move_to_device(task: M, share: DistInfo) -> M:
    """Moves a task to this process's device; on several GPUs its BatchNorms see the whole batch, unless it opts out."""
    if share.processes > 1 and share.device.type == "cuda" and getattr(task, "synchronizes_norms", True):
        task = nn.SyncBatchNorm.convert_sync_batchnorm(task)
    moved: M = task.to(share.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def batchnorm_notes(task: nn.Module, share: DistInfo) -> list[str]:
    """A note where processes do not share BatchNorm's statistics: SyncBatchNorm works on GPUs alone."""
    has_norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in task.modules())
    if share.processes == 1 or share.device.type != "cpu" or not has_norms:
        return []
    return [
        f"BatchNorm: on CPUs each of the {share.processes} processes takes the statistics of its own share, so loss and gradient are not "
        "those of one process with the whole batch; on GPUs they are"
    ]


def check_all_learn(task: nn.Module) -> None:
    """Checks, after the first backward pass, that each parameter that learns has a gradient.

    Raises:
        ConfigError: some have none, for which DistributedDataParallel would wait; on all processes.
    """
    idle = [name for name, parameter in task.named_parameters() if parameter.requires_grad and parameter.grad is None]
    if idle:
        raise ConfigError(
            f"the loss does not depend on {', '.join(idle[:3])}{f' and {len(idle) - 3} more' if len(idle) > 3 else ''}, and several "
            "processes can't train what has no gradient: call `requires_grad_(False)` on it where the task is built, or train in one "
            "process."
        )


def broadcast_buffers(module: nn.Module) -> None:
    """Gives every process the main one's buffers: BatchNorm's statistics differ by the last step's shares."""
    if dist.is_available() and dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def broadcast_from_main(accelerator: Accelerator, value: T) -> T:
    """The main process's value, on every process."""
    if accelerator.num_processes == 1:
        return value
    box = [value]
    broadcast_object_list(box, from_process=0)
    return box[0]


def all_gather_objects(accelerator: Accelerator, value: T) -> list[T]:
    """Each process's value, by rank, on every process."""
    values = [value] * accelerator.num_processes
    if accelerator.num_processes > 1:
        dist.all_gather_object(values, value)
    return values


def run_on_main(accelerator: Accelerator, make: Callable[[], T]) -> T | None:
    """Makes something on the main process alone (None elsewhere).

    Raises:
        ConfigError: on all processes, where the main process's ``make`` raised a UserError.
    """
    value, problem = None, None
    if accelerator.is_main_process:
        try:
            value = make()
        except UserError as error:
            problem = str(error)
    problem = broadcast_from_main(accelerator, problem)
    if problem is not None:
        raise ConfigError(problem.split("\n"))
    return value


def _number(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else default


def _processes_asked_of_launcher() -> int:
    """``--num_processes`` of a parent `accelerate launch`: with ``--cpu`` it starts one process without a word."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # no /proc: the guard by WORLD_SIZE remains
        return 1
    if "launch" not in words or "--num_machines" in words:
        return 1
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        value = value or following
        if name in ("--num_processes", "--num-processes") and value.isdigit():
            return int(value)
    return 1
