"""Processes forked from one that has imported everything: a test of several ranks need not wait for several interpreters.

What a launcher does is tested with the launcher (``tests.runs.command``); this is for tests of what the ranks do together.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

_ROOT = Path(__file__).parents[1]
_SECONDS = 300
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["ssl_pipeline.pretrain", "ssl_pipeline.finetune", "ssl_pipeline.cli"])


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
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    group = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables = [
        {**{key: str(value) for key, value in group.items()}, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment}
        for rank in range(count)
    ]
    return _forked(_ROOT / script, words, _ROOT, variables)


def forked(script: str, *words: str | Path, cwd: Path = _ROOT, **environment: str) -> CompletedProcess[str]:
    """Runs a script in one process of its own."""
    return _forked(_ROOT / script, words, cwd, [environment])


def _forked(
    script: Path, words: Sequence[str | Path], cwd: Path, variables: Sequence[dict[str, str]]
) -> CompletedProcess[str]:
    argv = [str(script), *map(str, words)]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(len(variables))]
        processes = [
            _FORKS.Process(target=_run, args=(argv, cwd, {**os.environ, "OMP_NUM_THREADS": "1", **own}, log))
            for own, log in zip(variables, logs, strict=True)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(_SECONDS)
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        out, err = ("".join(log.with_suffix(end).read_text() for log in logs) for end in (".out", ".err"))
    assert not late, f"{len(late)} processes were not done after {_SECONDS} s: {err}"
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    return CompletedProcess(argv, code, out, err)


def _run(argv: list[str], cwd: Path, environment: dict[str, str], log: Path) -> None:
    for stream, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(end), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
