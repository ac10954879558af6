"""A stage as a command: overrides in, one typed configuration out, mistakes as sentences."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel

from ssl_pipeline.config.base import ConfigError, StoppedByHand, StoppedByHandError, UserError, dump
from ssl_pipeline.config.compose import as_yaml, compose
from ssl_pipeline.config.help import help_of
from ssl_pipeline.config.hints import Stage as HintStage
from ssl_pipeline.config.hints import about_option
from ssl_pipeline.config.options import Parser, path
from ssl_pipeline.config.overrides import overridden
from ssl_pipeline.config.resolve import resolve
from ssl_pipeline.config.typed import typed_as

Stage = TypeVar("Stage", bound=BaseModel)
LOST = 71  # EX_OSERR of sysexits.h: another process, or a worker, was killed or hangs
EXIT_CODES = "SSL_PIPELINE_EXIT_CODES"  # names a file of `launch/run`: a launcher in between loses its processes' codes


def load(name: str, schema: type[Stage], overrides: Sequence[str] = (), config_dir: Path | None = None) -> Stage:
    """Composes and validates a stage's configuration.

    Raises:
        ConfigError: listing every mistake.
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
    """Runs a stage from the command line; leaves the process with the error's exit code when it is told in words."""
    verb = name.replace("_", " ", 1)  # `study domain` is composed from study_domain.yaml
    parser = Parser(prog=f"ssl-pipeline {verb}", add_help=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir", type=path)
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--help", "-h", action="store_true")
    options, others = parser.parse_known_intermixed_args(arguments)
    if options.help:
        summary = run.__doc__.splitlines()[0] if run.__doc__ else ""
        sys.stdout.write(help_of(verb, summary, options.overrides, options.config_dir))
        return
    try:
        if others:
            raise ConfigError(
                _about_options(
                    name, schema, options.config_dir, others, sys.argv[1:] if arguments is None else arguments
                )
            )
        config = load(name, schema, options.overrides, options.config_dir)
        if options.cfg:
            sys.stdout.write(as_yaml(dump(config)))
            return
        with typed_as(["ssl-pipeline", *verb.split(), *sys.argv[1:]]):
            run(config)
    except UserError as error:
        exit_with_error(error, f"ssl-pipeline {verb} --help")
    except KeyboardInterrupt as stop:
        exit_with_error(stopped_by_hand(stop, verb, resumes="resume" in schema.model_fields))
    except RuntimeError as error:
        if "home directory" not in str(error):  # pathlib's, of `~photos` where nobody is called photos
            raise
        exit_with_error(
            ConfigError(
                "a path starts with `~` and no user's name: write `~/NAME` below the home folder, and `./~NAME` for a file of that name."
            )
        )


def stopped_by_hand(stop: KeyboardInterrupt, verb: str, resumes: bool) -> StoppedByHandError:
    """What Ctrl-C has stopped, and the command that goes on with it where a run's folder is known.

    Args:
        stop: what was raised.
        verb: of the command.
        resumes: whether the command has the key ``resume``.
    """
    if not isinstance(stop, StoppedByHand) or stop.folder is None:
        return StoppedByHandError(f"{stop.what if isinstance(stop, StoppedByHand) else 'stopped by Ctrl-C'}.")
    words = [word for word in sys.argv[1:] if not word.startswith(("output=", "resume="))]
    place = words.index("--") if "--" in words else len(words)  # what follows it is told to all cells of a study
    added = [f"output={stop.folder}", *(["resume=auto"] if resumes else [])]
    typed = ["ssl-pipeline", *verb.split(), *words[:place], *added, *words[place:]]
    command = " ".join(map(_quoted, typed))
    if "LOCAL_RANK" in os.environ or any(name.startswith("ACCELERATE_") for name in os.environ):
        return StoppedByHandError(f"{stop.what}: go on by the same command with `{' '.join(map(_quoted, added))}`.")
    return StoppedByHandError(f"{stop.what}: go on by `{command}`.")


def _quoted(word: str) -> str:
    """A word for a shell; what Hydra wants in single quotes stays readable."""
    return f'"{word}"' if "'" in word and not set('"$`!\\') & set(word) else shlex.quote(word)


def _about_options(
    name: str, schema: type[BaseModel], config_dir: Path | None, unknown: Sequence[str], words: Sequence[str]
) -> list[str]:
    """What to type in place of options that there are not; each takes the word after it for its value."""
    stage, told = HintStage(name, schema, compose(name), config_dir), list[str]()
    for option in unknown:
        key, equals, value = option.partition("=")
        after = words[list(words).index(option) + 1 :][:1]
        taken = (
            value if equals else after[0] if after and "=" not in after[0] and not after[0].startswith("-") else None
        )
        told.append(about_option(stage, key, taken))
    return told


def check_folder_of(file: Path, key: str) -> None:
    """Refuses a file to be written whose folder is not there, before anything is computed.

    Raises:
        ConfigError: naming the folder, and the ``key`` that it was given by.
    """
    if not file.parent.is_dir():
        raise ConfigError(f"{key}: there is no folder {str(file.parent)!r}: make it, or name another file.")


def exit_with_error(error: UserError, hint: str = "") -> NoReturn:
    """Tells a mistake once (not once a process, if all know it) and leaves with its exit code."""
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
