"""A group of processes, as torchrun would start it, and the launchers themselves, all of them forked: see ``tests.forks``."""

from __future__ import annotations

import socket
from pathlib import Path
from subprocess import CompletedProcess

from tests.forks import run_all

ACCELERATE = ["-m", "accelerate.commands.accelerate_cli", "launch"]
TWO = [*ACCELERATE, "--config_file", "launch/accelerate/cpu_2.yaml"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ranks(count: int, script: str, *words: str | Path, **environment: str) -> CompletedProcess[str]:
    """Runs a script on a group of processes, as torchrun would: each has its rank and where the others are.

    Args:
        count: of processes.
        script: relative to the project's root.
        words: its arguments.
        environment: further variables.

    Returns:
        The first code that is not 0 of all processes, and what all of them wrote, rank by rank.
    """
    group = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    variables = {key: str(value) for key, value in group.items()} | environment
    each = [{**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return run_all([script, *words], each)
