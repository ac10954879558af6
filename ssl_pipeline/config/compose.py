"""Hydra composes YAML files and overrides into one tree of plain values. Hydra is imported here and nowhere else.

Only Hydra's composition is used: it makes no folder, changes no directory and configures no logging.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from ssl_pipeline.config.base import ConfigError


def config_root() -> Path:
    """The folder of our own YAML files: beside the package in a source tree, inside it in a wheel."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def choices(group: str, config_dir: Path | None = None) -> list[str]:
    """The YAML files of a config group, our own and the user's."""
    roots = [config_root(), *([config_dir] if config_dir else [])]
    return sorted({path.stem for root in roots for path in (root / group).glob("*.yaml")})


def compose(name: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> dict[str, Any]:
    """Composes ``configs/<name>.yaml`` with overrides.

    Args:
        name: ``pretrain``, ``finetune`` or ``study``.
        overrides: ``group=choice`` and ``a.b=value``, in Hydra's grammar. A key that the YAML does not list is let
            through: the schema knows all keys, and names the nearest one.
        config_dir: a folder of the user's own YAML, searched before ours.

    Returns:
        Plain dictionaries, lists and scalars.

    Raises:
        ConfigError: an override or a file cannot be read, a group has no such choice, or a folder is missing.
    """
    search = []
    if config_dir is not None:
        if not config_dir.is_dir():
            raise ConfigError(f"`--config-dir`: there is no folder {str(config_dir)!r}.")
        search = [f"hydra.searchpath=['file://{config_dir.resolve()}']"]
    groups = {path.name for root in (config_root(), config_dir) if root for path in root.iterdir() if path.is_dir()}
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_root()), version_base="1.3"):
            tree = hydra_compose(name, overrides=[*search, *(_let_through(text, groups) for text in overrides)])
            plain = OmegaConf.to_container(tree, resolve=True)
    except MissingConfigException as error:
        raise ConfigError(_missing(error, config_dir)) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_first_line(error)) from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(_unreadable(error, config_dir)) from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _let_through(override: str, groups: set[str]) -> str:
    key, equals, _ = override.partition("=")
    if not equals and not override.startswith("~"):
        raise ConfigError(
            f"{override!r} is not an override: write `group=choice` or `key=value` (see --help for the keys)."
        )
    if override.startswith(("~", "+")) or key in groups or key.split("@")[0] in groups:
        return override
    return f"++{override}"


def _missing(error: MissingConfigException, config_dir: Path | None) -> str:
    wanted = str(error.missing_cfg_file or "")
    group, _, choice = wanted.rpartition("/")
    known = choices(group, config_dir) if group else []
    if not known:
        return _first_line(error)
    close = difflib.get_close_matches(choice.removesuffix(".yaml"), known, n=1)
    hint = f" Did you mean `{group}={close[0]}`?" if close else ""
    return f"`{group}={choice}`: there is no such choice. Known: {', '.join(known)}.{hint}"


def _unreadable(error: YAMLError | UnicodeDecodeError, config_dir: Path | None) -> str:
    """Which file is no YAML, and where and why; all that people wrote themselves lies in their own folder."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: this is no YAML ({error.problem}). Mend that line, or the one before it."
    broken = [str(path) for path in sorted((config_dir or config_root()).rglob("*.yaml")) if not _is_text(path)]
    return f"{', '.join(broken)}: this is no text in UTF-8, or holds signs that YAML does not allow. Save it anew as UTF-8."


def _is_text(path: Path) -> bool:
    try:
        return all(sign.isprintable() or sign in "\t\r\n" for sign in path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return False


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"\+\+", "", lines[0]) if lines else type(error).__name__
    return f"The configuration can't be composed: {text}"
