"""A stage as a command: overrides in, one typed configuration out, mistakes as sentences."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel

from ssl_pipeline.config.base import ConfigError, StoppedByHand, StoppedByHandError, UserError, dump
from ssl_pipeline.config.compose import as_yaml, compose, verb_of_config
from ssl_pipeline.config.help import help_of
from ssl_pipeline.config.options import Parser, path
from ssl_pipeline.config.overrides import overridden
from ssl_pipeline.config.schema import resolve
from ssl_pipeline.config.suggest import Stage as Suggested
from ssl_pipeline.config.suggest import about_option

Stage = TypeVar("Stage", bound=BaseModel)
LOST = 71  # EX_OSERR of sysexits.h: another process, or a worker, was killed or hangs
EXIT_CODES = "SSL_PIPELINE_EXIT_CODES"  # names a file of `launch/run`: a launcher in between loses its processes' codes
_TYPED: ContextVar[tuple[str, ...] | None] = ContextVar("typed", default=None)


def load(name: str, schema: type[Stage], overrides: Sequence[str] = (), config_dir: Path | None = None) -> Stage:
    """Composes and validates a stage's configuration.

    Raises:
        ConfigError: lists every mistake.
    """
    tree, problems = overridden(name, schema, overrides, config_dir)
    try:
        config = resolve(schema, tree)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return config


def run_command(
    name: str, schema: type[Stage], run: Callable[[Stage], Any], arguments: Sequence[str] | None = None
) -> None:
    """Runs a stage from the command line; on a mistake of the user the process exits with the error's code."""
    verb = verb_of_config(name)
    parser = Parser(prog=f"ssl-pipeline {verb}", add_help=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir", type=path)
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--help", "-h", action="store_true")
    options, unknown = parser.parse_known_intermixed_args(arguments)
    if options.help:
        summary = run.__doc__.splitlines()[0] if run.__doc__ else ""
        sys.stdout.write(help_of(verb, summary, options.overrides, options.config_dir))
        return
    try:
        if unknown:
            stage = Suggested(name, schema, compose(name), options.config_dir)
            raise ConfigError(_about_options(stage, unknown, sys.argv[1:] if arguments is None else arguments))
        config = load(name, schema, options.overrides, options.config_dir)
        if options.cfg:
            sys.stdout.write(as_yaml(dump(config)))
            return
        with typed_as(["ssl-pipeline", *verb.split(), *sys.argv[1:]]), _interrupts_not_lost():
            run(config)
    except UserError as error:
        exit_with_error(error, f"ssl-pipeline {verb} --help")
    except KeyboardInterrupt as stop:
        exit_with_error(stopped_by_hand(stop, verb, resumes="resume" in schema.model_fields))
    except RuntimeError as error:
        if "home directory" not in str(error):  # pathlib's, for `~photos` where no user is called photos
            raise
        exit_with_error(
            ConfigError(
                "a path starts with `~` and no user's name: write `~/NAME` below the home folder, and `./~NAME` for a file of that name."
            )
        )


@contextmanager
def _interrupts_not_lost() -> Iterator[None]:
    """Inside, an error after Ctrl-C is Ctrl-C: C++ of torch turns a KeyboardInterrupt in its callbacks into a ValueError."""
    before, came = signal.getsignal(signal.SIGINT), list[int]()
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if came:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def typed_as(words: Sequence[str]) -> Iterator[None]:
    """Inside, :func:`command_words` gives these words: a verb's module no longer sees the verb in ``sys.argv``."""
    token = _TYPED.set(tuple(words))
    try:
        yield
    finally:
        _TYPED.reset(token)


def command_words() -> list[str]:
    """The command as a person would type it; ``sys.argv`` of a program that calls us from Python."""
    return list(_TYPED.get() or sys.argv)


def stopped_by_hand(stop: KeyboardInterrupt, verb: str, resumes: bool) -> StoppedByHandError:
    """What Ctrl-C has stopped, and the command that continues it where a run's folder is known.

    ``resumes``: whether the command has the key ``resume``.
    """
    if not isinstance(stop, StoppedByHand) or stop.folder is None:
        return StoppedByHandError(f"{stop.what if isinstance(stop, StoppedByHand) else 'stopped by Ctrl-C'}.")
    added = [f"output={stop.folder}", *(["resume=auto"] if resumes else [])]
    if "LOCAL_RANK" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ):
        return StoppedByHandError(f"{stop.what}: go on by the same command with `{' '.join(map(_quoted, added))}`.")
    words = [word for word in sys.argv[1:] if not word.startswith(("output=", "resume="))]
    end = words.index("--") if "--" in words else len(words)  # what follows `--` is for the runs of a study
    typed = ["ssl-pipeline", *verb.split(), *words[:end], *added, *words[end:]]
    return StoppedByHandError(f"{stop.what}: go on by `{' '.join(map(_quoted, typed))}`.")


def _quoted(word: str) -> str:
    """A word for a shell; what Hydra wants in single quotes stays readable."""
    return f'"{word}"' if "'" in word and not set('"$`!\\') & set(word) else shlex.quote(word)


def _about_options(stage: Suggested, unknown: Sequence[str], words: Sequence[str]) -> list[str]:
    answers = list[str]()
    for option in unknown:
        key, equals, value = option.partition("=")
        following = next(iter(words[list(words).index(option) + 1 :]), "-")
        is_value = "=" not in following and not following.startswith("-")
        answers.append(about_option(stage, key, value if equals else following if is_value else None))
    return answers


def check_folder_of(file: Path, key: str) -> None:
    """Refuses a file whose folder does not exist, before anything is computed.

    Raises:
        ConfigError: names the folder, and the ``key`` that it was given by.
    """
    if not file.parent.is_dir():
        raise ConfigError(f"{key}: there is no folder {str(file.parent)!r}: make it, or name another file.")


def exit_with_error(error: UserError, hint: str = "") -> NoReturn:
    """Prints a mistake, once if all processes know it, and exits with its code."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or not error.everywhere:
        lines = str(error).splitlines()
        marked = lines if len(lines) == 1 else [f"{len(lines)} things are wrong:", *(f"  - {line}" for line in lines)]
        who = [] if error.everywhere or "RANK" not in os.environ else [f"process {rank}:"]
        help_line = [f"({hint} lists the keys.)"] if hint and error.exit_code == 2 else []
        sys.stderr.write("\n".join([*who, *marked, *help_line]) + "\n")
        sys.stderr.flush()
    if EXIT_CODES in os.environ:
        with Path(os.environ[EXIT_CODES]).open("a", encoding="utf-8") as file:
            file.write(f"{error.exit_code}\n")
    raise SystemExit(error.exit_code) from None
