"""Python processes that start in milliseconds: forked from one that has imported everything, as are those that they start.

Everything but the interpreter's start is a process's own: words, environment, folder, streams, session, signals and exit code.
"""

from __future__ import annotations

import atexit
import inspect
import multiprocessing
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from types import MappingProxyType
from typing import Any

import psutil

_ROOT = Path(__file__).parents[1]
_SECONDS = 600
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "ssl_pipeline.pretrain", "ssl_pipeline.finetune", "ssl_pipeline.cli", "ssl_pipeline.engine.launcher",
        "accelerate.commands.accelerate_cli", "torch.distributed.run", "tests.forks",
    ]
)  # fmt: skip


class Forked:
    """A process under way.

    Args:
        words: as after ``python``: a script, ``-m MODULE`` or ``-c CODE``, and its arguments.
        out: what it writes to standard output.
        error: what it writes to standard error; by default the same file.
        cwd: its working folder.
        environment: further variables.
        session: it has a session of its own.
    """

    def __init__(
        self,
        words: Sequence[str | Path],
        out: Path,
        error: Path | None = None,
        cwd: Path = _ROOT,
        environment: Mapping[str, str] = MappingProxyType({}),
        session: bool = False,
    ) -> None:
        self._words = list(map(str, words))
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self._process = _FORKS.Process(target=_live, args=(self._words, out, error, cwd, session, variables))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, or minus the signal that killed it; None while it lives."""
        return self._process.exitcode

    def wait(self, seconds: float = _SECONDS) -> int:
        """Waits for its end.

        Raises:
            TimeoutExpired: it was not done in time, and is killed with all that it has started.
        """
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            self.kill()
            raise subprocess.TimeoutExpired(self._words, seconds)
        return code

    def kill(self) -> None:
        """Ends it and all that it has started."""
        if self.poll() is None:
            for process in psutil.Process(self.pid).children(recursive=True):
                process.kill()
            self._process.kill()
            self._process.join()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def run_all(
    words: Sequence[str | Path],
    environments: Sequence[Mapping[str, str]],
    cwd: Path = _ROOT,
    seconds: float = _SECONDS,
) -> CompletedProcess[str]:
    """Runs a Python once for each environment, all at the same time.

    Returns:
        The first code that is not 0, and what all of them wrote, one after the other.
    """
    with tempfile.TemporaryDirectory() as folder:
        outs, errors = ([Path(folder) / f"{n}.{end}" for n in range(len(environments))] for end in ("out", "err"))
        processes = [
            Forked(words, out, error, cwd, environment)
            for out, error, environment in zip(outs, errors, environments, strict=True)
        ]
        try:
            codes = [process.wait(seconds) for process in processes]
        except subprocess.TimeoutExpired as late:
            for process in processes:
                process.kill()
            raise AssertionError("".join(error.read_text() for error in errors)) from late
        out, error = ("".join(log.read_text() for log in logs) for logs in (outs, errors))
    return CompletedProcess([str(word) for word in words], next(filter(None, codes), 0), out, error)


def _live(
    words: list[str], out: Path, error: Path | None, cwd: Path, session: bool, environment: dict[str, str]
) -> None:
    if session:
        os.setsid()
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1 if error is None else os.open(error, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess.Popen = subprocess_handler.Popen = _Popen  # type: ignore[misc,attr-defined]
    os.chdir(cwd)
    _interpret(words, environment)


class _Popen(subprocess.Popen[Any]):
    """Forks where a Python would be started."""

    def _execute_child(self, *values: Any) -> None:
        real: Any = super()
        given = inspect.signature(real._execute_child).bind(*values).arguments
        if given["args"][0] != sys.executable:
            real._execute_child(*values)
            return
        self.pid = os.fork()
        if self.pid == 0:
            _begin(given)
        self._child_created = True
        self._close_pipe_fds(*(given[f"{name}{end}"] for name in ("p2c", "c2p", "err") for end in ("read", "write")))  # type: ignore[attr-defined]


def _begin(given: dict[str, Any]) -> None:
    """What a new program begins with, in a fork: none of the handlers, files and exit functions of the one before."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    for stream, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
        if given[name] != -1:
            os.dup2(given[name], stream)
    if given["start_new_session"]:
        os.setsid()
    if given["preexec_fn"]:
        given["preexec_fn"]()
    if given["cwd"]:
        os.chdir(given["cwd"])
    _interpret(given["args"][1:], os.environ.copy() if given["env"] is None else given["env"])


def _interpret(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """What Python does with its words; does not return."""
    # Workers are started by the platform's method, and not by that by which this process was made.
    multiprocessing.set_start_method(None, force=True)
    _FORKS.set_forkserver_preload([])
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    words = [str(word) for word in words]
    if words[0] == "-u":
        del words[0]
    code: Any = 0
    try:
        _execute(words)
    except SystemExit as left:
        code = left.code or 0
        if not isinstance(code, int):
            sys.stderr.write(f"{code}\n")
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _execute(words: list[str]) -> None:
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, "")
        sys.modules.pop(words[1], None)  # it is imported: a new interpreter would not have it yet
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")
