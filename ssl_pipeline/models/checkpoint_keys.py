"""Finds the network in a checkpoint of any code, whatever prefix its keys have."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssl_pipeline.config.base import ConfigError

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


@dataclass(frozen=True)
class _Part:
    """A place in the file where names of the network are found.

    Attributes:
        prefix: of their keys, without the last dot.
        tensors: all that has the prefix, under the network's own names.
        fitting: how many of the network's tensors are there in their shape.
        named: how many are there by name.
    """

    prefix: str
    tensors: dict[str, Tensor]
    fitting: int
    named: int

    @property
    def rank(self) -> int:
        """The highest of several alike is taken."""
        words = set(re.split(r"[._]", self.prefix))
        return bool(words & _PREFERRED) - bool(words & _SECOND)

    @property
    def name(self) -> str:
        return f"`{self.prefix}`" if self.prefix else "the outermost names"

    def is_meant_by(self, key: str) -> bool:
        """Whether ``backbone.weights_key`` names it: one or more of the names on the way to it."""
        return f".{key.strip('.')}." in f".{self.prefix}."


def find_network(
    trunk: nn.Module, tensors: Mapping[str, Tensor], what: str, key: str | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """The network's part of a checkpoint, under the network's own names.

    The part is where most of the network's names end the file's: ``state_dict.module.encoder_q.layer1.0.conv1.weight``. Children may
    be numbered, as in lightly's ``nn.Sequential(*list(resnet.children())[:-1])``. Of several parts that fit alike a teacher or an
    average is preferred, and a student, a momentum encoder, a target network and an encoder of keys come last.

    Args:
        trunk: the network, without its classifier.
        tensors: of :func:`~ssl_pipeline.models.checkpoint_file.read_tensors`.
        what: the file, for messages.
        key: which part is wanted; None leaves it to the rule above.

    Returns:
        The state dict (whose shapes are not checked yet), and notes for the log.

    Raises:
        ConfigError: no part fits, ``key`` names none, or several fit alike.
    """
    tensors = {_INNER.sub("", name): value for name, value in tensors.items()}
    own = {name: value.shape for name, value in trunk.state_dict().items()}
    parts = [part for part in _parts(trunk, own, tensors) if 2 * part.named >= len(own)]
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
    chosen, others = _choose(meant, own, what)
    state, heads = _without_heads(chosen.tensors, own)
    return state, _notes(chosen, others, heads, len(tensors))


def _parts(trunk: nn.Module, own: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]) -> list[_Part]:
    """All places where a name of the network ends a name of the file."""
    numbers = {name: str(place) for place, (name, _) in enumerate(trunk.named_children())}

    def numbered(name: str) -> str:
        child, dot, rest = name.partition(".")
        return f"{numbers.get(child, child)}{dot}{rest}"

    found = []
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
            found.append(_Part(prefix, inside, fitting, len(names)))
    return found


def _choose(parts: list[_Part], own: Mapping[str, object], what: str) -> tuple[_Part, list[_Part]]:
    """The part to take, and others that fit as well; an error where several differ and nothing decides."""
    most = max((part.fitting, part.named) for part in parts)
    alike = [part for part in parts if (part.fitting, part.named) == most]
    best = max(part.rank for part in alike)
    first, *rest = [part for part in alike if part.rank == best]
    differing = [part for part in rest if not _equal(part.tensors, first.tensors, own)]
    if differing:
        raise ConfigError(
            f"{what} holds several networks that fit: {_listed([first, *differing])}. Choose one by its key: "
            f"backbone.weights_key={_word(first, differing[0])}."
        )
    return first, [part for part in alike if part not in (first, *rest)]


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor], own: Mapping[str, object]) -> bool:
    """Whether two parts hold the same network; their heads may differ."""
    return all(torch.equal(one[name], other[name]) for name in one.keys() & other.keys() & own.keys())


def _without_heads(state: dict[str, Tensor], own: Mapping[str, object]) -> tuple[dict[str, Tensor], int]:
    """Leaves out what pretraining had beside the network; the network's own classifier stays for the loader to count."""

    def is_head(name: str) -> bool:
        return name not in own and name.startswith(_HEADS)

    kept = {name: value for name, value in state.items() if not is_head(name)}
    return kept, len(state) - len(kept)


def _notes(chosen: _Part, others: list[_Part], heads: int, count: int) -> list[str]:
    beside = count - len(chosen.tensors) + heads
    if chosen.prefix in _PLAIN and not beside and not others:
        return []
    line = f"backbone: read from {chosen.name}"
    if beside:
        line += f", {beside} tensors beside it left out"
    if others:
        line += f"; {_listed(others)} would fit, too (backbone.weights_key={_word(others[0], chosen)})"
    return [line]


def _listed(parts: list[_Part]) -> str:
    return ", ".join(dict.fromkeys(part.name for part in parts))


def _word(part: _Part, other: _Part) -> str:
    """The shortest key that names a part and not the other."""
    words = part.prefix.split(".")
    return next((word for word in words if word and not other.is_meant_by(word)), part.prefix or "''")


def _contents(tensors: Mapping[str, Tensor]) -> str:
    """A file's branches with a tensor of each, for messages."""
    prefix = ""
    while True:
        rest = [name[len(prefix) :] for name in tensors if name.startswith(prefix)]
        heads = {name.partition(".")[0] for name in rest}
        if len(heads) != 1 or "." not in rest[0]:
            break
        prefix += f"{heads.pop()}."
    branches: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        branches[prefix + name[len(prefix) :].partition(".")[0]].append(name)
    shown = []
    for branch, names in list(branches.items())[:6]:
        first = names[0]
        size = "×".join(map(str, tensors[first].shape)) or "one number"
        inner = first[len(branch) + 1 :]
        count = f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'}"
        shown.append(f"`{branch}` ({count}{f', {inner}' if inner else ''}: {size})")
    return ", ".join(shown) + (f" and {len(branches) - 6} more" if len(branches) > 6 else "")
