"""Other people's checkpoints: tensors by dotted name, and the network among them. Nothing that a file says is ever run.

``torch.load(weights_only=True)`` refuses a file for one ``argparse.Namespace`` beside its tensors, and many
published checkpoints have something of that kind: arguments, a path, a numpy scalar. The kinds that are listed here are read as blanks: a class
of ours takes the place of theirs, so that neither their module is imported nor their code called. Everything else is refused.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

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

# Wrappers in the middle of a name: torch.compile's, FSDP's, activation checkpointing's.
_INNER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PLAIN = {"", "state_dict", "model", "module", "state_dict.module", "model.module"}
# Of two equal networks the slower average is the better one; the copy that only gives targets is not evaluated.
_PREFERRED = {"teacher", "ema"}
_SECOND = {"student", "momentum", "target", "key", "k"}
# What pretraining has beside the network, under the same prefix as the network's own tensors.
_HEADS = (
    "projection", "projector", "proj_head", "prototypes", "predict", "decoder", "mask_token", "masked_embed", "queue", "dino_head",
    "ibot_head", "contrastive_head", "online_classifier",
)  # fmt: skip


class _Blank:
    """Takes the place of an object that is not needed, and keeps nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Entries:
    """Takes the place of a kind of dict, whose entries may be tensors: an ordinary one, which torch's reader fills."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint (``.safetensors``, or a file that ``torch.save`` wrote, under any ending).

    Returns:
        Tensors by their keys from the outermost to the innermost, with dots between: ``state_dict.module.conv1.weight``.

    Raises:
        ConfigError: it is not there, damaged, no checkpoint, or holds objects that would have to be run.
    """
    if not path.is_file():
        raise ConfigError(f"`backbone.weights`: there is no file {str(path)!r}.")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ConfigError(
            f"`backbone.weights`: {str(path)!r} is a pointer of Git LFS and not the file itself: fetch it with `git lfs pull`."
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ConfigError(
            f"`backbone.weights`: {str(path)!r} is a web page, as a link to the page of a download gives: download the file itself."
        )
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


@dataclass(frozen=True)
class _Part:
    """A place in the file where names of the network are found.

    Attributes:
        prefix: of their keys, without the last dot.
        tensors: all that has the prefix, under the network's own names.
        fitting: how many of the network's tensors are there in their shape, and how many by name.
    """

    prefix: str
    tensors: dict[str, Tensor]
    fitting: tuple[int, int]

    @property
    def rank(self) -> int:
        """The highest of several alike is taken."""
        words = set(re.split(r"[._]", self.prefix))
        return bool(words & _PREFERRED) - bool(words & _SECOND)

    def equals(self, other: _Part, own: Mapping[str, object]) -> bool:
        """Whether both hold the same network; their heads may differ."""
        shared = self.tensors.keys() & other.tensors.keys() & own.keys()
        return all(torch.equal(self.tensors[name], other.tensors[name]) for name in shared)

    def is_meant_by(self, key: str) -> bool:
        """Whether ``backbone.weights_key`` names it: one or more of the names on the way to it."""
        return f".{key.strip('.')}." in f".{self.prefix}."

    def key_against(self, other: _Part) -> str:
        """The shortest key that names it and not the other."""
        words = self.prefix.split(".")
        return next((word for word in words if word and not other.is_meant_by(word)), self.prefix or "''")


def find_network(
    trunk: nn.Module, tensors: Mapping[str, Tensor], what: str, key: str | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """The network's part of a checkpoint, under the network's own names.

    The part is where most of the network's names end the file's: ``state_dict.module.encoder_q.layer1.0.conv1.weight``. Children may
    be numbered, as in lightly's ``nn.Sequential(*list(resnet.children())[:-1])``. Of several parts that fit alike a teacher or an
    average is preferred, and a student, a momentum encoder, a target network and an encoder of keys come last.

    Args:
        trunk: the network, without its classifier.
        tensors: of :func:`read_tensors`.
        what: the file, for messages.
        key: which part is wanted; None leaves it to the rule above.

    Returns:
        The state dict (whose shapes are not checked yet), and notes for the log.

    Raises:
        ConfigError: no part fits, ``key`` names none, or several fit alike.
    """
    tensors = {_INNER.sub("", name): value for name, value in tensors.items()}
    own = {name: value.shape for name, value in trunk.state_dict().items()}
    parts = [part for part in _parts(trunk, own, tensors) if 2 * part.fitting[1] >= len(own)]
    if not parts:
        names = list(own)
        raise ConfigError(
            f"{what} is of another architecture: {len(names)} keys missing ({', '.join(names[:3])}, …), and no part of the file has names "
            f"like these. It holds {_contents(tensors)}. Build the architecture that it was saved from (`backbone.name`), or "
            "give other weights."
        )
    meant = parts if key is None else [part for part in parts if part.is_meant_by(key)]
    if not meant:
        raise ConfigError(
            f"`backbone.weights_key`: {what} has no network under {key!r}. There is one under {_listed(parts)}; the file holds "
            f"{_contents(tensors)}."
        )
    alike = [part for part in meant if part.fitting == max(one.fitting for one in meant)]
    first, *rest = [part for part in alike if part.rank == max(one.rank for one in alike)]
    differing = [part for part in rest if not part.equals(first, own)]
    if differing:
        raise ConfigError(
            f"{what} holds several networks that fit: {_listed([first, *differing])}. Choose one by its key: "
            f"backbone.weights_key={first.key_against(differing[0])}."
        )
    # The network's own classifier stays for the loader to count.
    state = {name: one for name, one in first.tensors.items() if name in own or not name.startswith(_HEADS)}
    others = [part for part in alike if part.rank < first.rank]
    beside = len(tensors) - len(state)
    if first.prefix in _PLAIN and not beside and not others:
        return state, []
    note = f"backbone: read from {_listed([first])}"
    if beside:
        note += f", {beside} tensors beside it left out"
    if others:
        note += f"; {_listed(others)} would fit, too (backbone.weights_key={others[0].key_against(first)})"
    return state, [note]


def _parts(trunk: nn.Module, own: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]) -> Iterator[_Part]:
    """All places where a name of the network ends a name of the file."""
    numbers = {name: str(place) for place, (name, _) in enumerate(trunk.named_children())}

    def numbered(name: str) -> str:
        child, dot, rest = name.partition(".")
        return f"{numbers.get(child, child)}{dot}{rest}"

    for spelling in ({name: name for name in own}, {numbered(name): name for name in own}):
        hits: dict[str, dict[str, str]] = defaultdict(dict)
        for full in tensors:
            for start in (0, *(dot.end() for dot in re.finditer(r"\.", full))):
                name = spelling.get(full[start:])
                if name is not None:
                    hits[full[: max(start - 1, 0)]][full] = name
        for prefix, names in hits.items():
            begin = f"{prefix}." if prefix else ""
            inside = {
                names.get(full, full.removeprefix(begin)): value
                for full, value in tensors.items()
                if full.startswith(begin)
            }
            fitting = sum(own[name] == inside[name].shape for name in names.values())
            yield _Part(prefix, inside, (fitting, len(names)))


def _listed(parts: list[_Part]) -> str:
    return ", ".join(dict.fromkeys(f"`{part.prefix}`" if part.prefix else "the outermost names" for part in parts))


def _contents(tensors: Mapping[str, Tensor]) -> str:
    """A file's branches with a tensor of each, for messages."""
    names = list(tensors)
    depth = 0  # of the names that all tensors share
    while len({tuple(name.split(".")[: depth + 1]) for name in names}) == 1 and "." in names[0].split(".", depth)[-1]:
        depth += 1
    branches: dict[str, list[str]] = defaultdict(list)
    for name in names:
        branches[".".join(name.split(".")[: depth + 1])].append(name)
    shown = []
    for branch, (first, *others) in list(branches.items())[:6]:
        size = "×".join(map(str, tensors[first].shape)) or "one number"
        inner = first[len(branch) + 1 :]
        count = f"{1 + len(others)} {'tensors' if others else 'tensor'}"
        shown.append(f"`{branch}` ({count}{f', {inner}' if inner else ''}: {size})")
    return ", ".join(shown) + (f" and {len(branches) - 6} more" if len(branches) > 6 else "")
