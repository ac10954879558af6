"""Other people's checkpoints as tensors by dotted name. Nothing that a file says is ever run.

``torch.load(weights_only=True)`` refuses a file for one ``argparse.Namespace`` beside its tensors, and many
published checkpoints have something of that kind: arguments, a path, a numpy scalar. The kinds that are listed here are read as blanks: a class
of ours takes the place of theirs, so that neither their module is imported nor their code called. Everything else is refused.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ssl_pipeline.config.base import ConfigError

_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_LIGHTNING = ("pytorch_lightning", "lightning.pytorch")
_VALUES = (
    "argparse.Namespace", "types.SimpleNamespace", "typing.Any",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "frozenset", "int", "list", "str", "tuple")),
    *(f"datetime.{name}" for name in ("date", "datetime", "timedelta")),
    *(f"pathlib{inner}.{name}" for inner in ("", "._local") for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")),
    "numpy.dtype", "numpy.ndarray", *(f"{module}.{name}" for module in _NUMPY for name in ("scalar", "_reconstruct")),
    "torch.torch_version.TorchVersion",
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "base.Metadata", "base.ContainerMetadata")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")),
    "mmengine.logging.history_buffer.HistoryBuffer",
    *(f"{module}.callbacks.{name}" for module in _LIGHTNING
      for name in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping")),
)  # fmt: skip
_MAPPINGS = (
    "collections.defaultdict", "yacs.config.CfgNode", "fvcore.common.config.CfgNode", "easydict.EasyDict", "addict.addict.Dict",
    "mmengine.config.config.ConfigDict", "mmcv.utils.config.ConfigDict",
    *(f"{module}.utilities.parsing.AttributeDict" for module in _LIGHTNING),
    "lightning_fabric.utilities.data.AttributeDict", "lightning.fabric.utilities.data.AttributeDict",
)  # fmt: skip


class _Blank:
    """Takes the place of an object that is not needed, and keeps nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Attributes are dropped."""


class _Entries:
    """Takes the place of a kind of dict, whose entries may be tensors: an ordinary one, which torch's reader fills."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whatever they are nested in.

    Args:
        path: ``.safetensors``, or a file that ``torch.save`` wrote, under any ending.

    Returns:
        Tensors by their keys from the outermost to the innermost, with dots between: ``state_dict.module.conv1.weight``.

    Raises:
        ConfigError: it is not there, damaged, no checkpoint, or holds objects that would have to be run.
    """
    if not path.is_file():
        raise ConfigError(f"`backbone.weights`: there is no file {str(path)!r}.")
    with path.open("rb") as file:
        start = file.read(64)
    _check_start(path, start)
    try:
        if path.suffix == ".safetensors" or start[8:9] == b"{":
            tree = load_file(path)
        else:
            stand_ins: list[Any] = [*((_Blank, name) for name in _VALUES), *((_Entries, name) for name in _MAPPINGS)]
            with torch.serialization.safe_globals(stand_ins):
                tree = torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"`backbone.weights`: {str(path)!r} is no file of tensors alone{_others(path)}, or it is damaged, and no code is ever run from "
            "one: ask its author for .safetensors; or, where you trust it, write its tensors to a new file with "
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"`backbone.weights`: {str(path)!r} can't be read as weights: {error}") from error
    found = {name.removeprefix("."): value for name, value in _tensors("", tree)}
    if not found:
        raise ConfigError(f"`backbone.weights`: {str(path)!r} holds no state dict (names and tensors).")
    return found


def _tensors(name: str, tree: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield name, tree.detach()
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _tensors(f"{name}.{key}", value)


def _check_start(path: Path, start: bytes) -> None:
    """Refuses what is often found in the place of a checkpoint."""
    if start.startswith(b"version https://git-lfs"):
        raise ConfigError(
            f"`backbone.weights`: {str(path)!r} is a pointer of Git LFS and not the file itself: fetch it with `git lfs pull`."
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ConfigError(
            f"`backbone.weights`: {str(path)!r} is a web page, as a link to the page of a download gives: download the file itself."
        )


def _others(path: Path) -> str:
    """What else the file's pickle names; nothing is loaded for that."""
    if not zipfile.is_zipfile(path):
        return ""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the reader meets damaged and malicious files; the refusal stands without it
        return ""
    others = sorted(set(named) - {*_VALUES, *_MAPPINGS})
    return f" (it also holds {', '.join(others[:3])}{', …' if len(others) > 3 else ''})" if others else ""
