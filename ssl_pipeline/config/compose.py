"""Hydra composes YAML files and choices into one tree of plain values. Hydra is used for nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from ssl_pipeline.config.base import ConfigError, closest
from ssl_pipeline.config.values import listed


def config_root() -> Path:
    """The folder of our own YAML files: beside the package in a source tree, inside it in a wheel."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _roots(config_dir: Path | None) -> list[Path]:
    return [root for root in (config_dir, config_root()) if root and root.is_dir()]


def choices(group: str, config_dir: Path | None = None) -> list[str]:
    """The YAML files of a config group, our own and the user's."""
    return sorted({path.stem for root in _roots(config_dir) for path in (root / group).glob("*.yaml")})


def choice_file(group: str, choice: str, config_dir: Path | None = None) -> Path | None:
    """The YAML file of a choice, the user's own first; None where there is none."""
    return next((file for root in _roots(config_dir) if (file := root / group / f"{choice}.yaml").is_file()), None)


def groups(config_dir: Path | None = None) -> set[str]:
    """The names of all groups, our own and the user's."""
    return {path.name for root in _roots(config_dir) for path in root.iterdir() if path.is_dir()}


def group_choices(name: str) -> dict[str, str | None]:
    """The groups of ``configs/<name>.yaml`` in its order, each with its default choice."""
    entries = yaml.safe_load((config_root() / f"{name}.yaml").read_text(encoding="utf-8")).get("defaults", [])
    return {group: choice for entry in entries if isinstance(entry, dict) for group, choice in entry.items()}


def compose(name: str, selections: Sequence[str] = (), config_dir: Path | None = None) -> dict[str, Any]:
    """The plain values of ``configs/<name>.yaml`` with choices of groups; see :func:`composed`."""
    return resolved(composed(name, selections, config_dir)[0])


def composed(
    name: str, selections: Sequence[str] = (), config_dir: Path | None = None
) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Composes ``configs/<name>.yaml`` with choices of groups in Hydra's grammar; the user's folder is searched before ours.

    Returns:
        Plain values, with interpolations not yet resolved, and the choice of each group.

    Raises:
        ConfigError: a file can't be read, a group has no such choice, or a folder is missing.
    """
    search = []
    if config_dir is not None:
        if not config_dir.is_dir():
            raise ConfigError(f"`--config-dir`: there is no folder {str(config_dir)!r}.")
        search = [f"hydra.searchpath={listed([f'file://{config_dir.resolve()}'])}"]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_root()), version_base="1.3"):
            found = hydra_compose(name, overrides=[*search, *selections], return_hydra_config=True)
        taken = dict(found.hydra.runtime.choices)
        OmegaConf.set_struct(found, False)
        del found["hydra"]
        tree = OmegaConf.to_container(found)
    except MissingConfigException as error:
        raise ConfigError(_missing(error, config_dir)) from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(_unreadable(error, config_dir)) from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_not_composed(error)) from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}, taken


def resolved(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree with the values of its interpolations, such as ``${seed}``.

    Raises:
        ConfigError: one of them has no value.
    """
    try:
        plain = OmegaConf.to_container(OmegaConf.create(dict(tree)), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_not_composed(error)) from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def literal(value: Any) -> Any:
    """A value whose texts stay themselves when :func:`resolved`: nothing in them is an interpolation."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", value)
    if isinstance(value, Mapping):
        return {key: literal(inner) for key, inner in value.items()}
    return [literal(inner) for inner in value] if isinstance(value, list | tuple) else value


def verb_of_config(name: str) -> str:
    """``study_domain``, the name of a YAML file, to ``study domain``, its verb; ``plot_views`` to ``plot-views``."""
    return name.replace("study_", "study ", 1).replace("plot_", "plot-", 1)


def as_yaml(tree: Mapping[str, Any]) -> str:
    """A tree as YAML that :func:`read_yaml` reads as the same again, whatever its texts hold."""
    return OmegaConf.to_yaml(OmegaConf.create(literal(tree)))


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file; raises what its parsers raise."""
    return OmegaConf.to_container(OmegaConf.load(path), resolve=True)


def _missing(error: MissingConfigException, config_dir: Path | None) -> str:
    group, _, choice = str(error.missing_cfg_file or "").rpartition("/")
    known = choices(group, config_dir) if group else []
    if not known:
        return _not_composed(error)
    close = closest(choice.removesuffix(".yaml"), known)
    hint = f" Did you mean `{group}={close}`?" if close else ""
    return f"`{group}={choice}`: there is no such choice. Known: {', '.join(known)}.{hint}"


def _unreadable(error: YAMLError | UnicodeDecodeError, config_dir: Path | None) -> str:
    """Which file is no YAML, where and why; what people wrote themselves is in their own folder."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: this is no YAML ({error.problem}). Correct that line, or the one before it."
    broken = [str(path) for path in sorted((config_dir or config_root()).rglob("*.yaml")) if not _is_text(path)]
    return f"{', '.join(broken)}: this is no text in UTF-8, or holds characters that YAML does not allow. Save it as UTF-8."


def _is_text(path: Path) -> bool:
    try:
        return all(sign.isprintable() or sign in "\t\r\n" for sign in path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return False


def _not_composed(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0].replace("++", "") if lines else type(error).__name__
    return f"The configuration can't be composed: {text}"
