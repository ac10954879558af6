"""Names that lightly, Lightning and our own artifacts give a network's tensors, back to the network's own."""

from __future__ import annotations

import re

from torch import Tensor, nn

_WRAPPERS = ("backbone.", "trunk.", "encoder.", "model.", "_model.", "student_backbone.", "wrapped_model.")


def own_names(trunk: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict under the trunk's own names, where they can be told.

    Lightly's examples wrap a trunk as ``backbone = nn.Sequential(*list(resnet.children())[:-1])`` and keep it beside a
    projection head in a Lightning checkpoint: ``backbone.4.0.conv1.weight`` is ``layer1.0.conv1.weight``.

    Args:
        trunk: where the tensors are to go.
        state: the file's names.

    Returns:
        The state dict, and notes for the log; both as they came where the names are the trunk's already.
    """
    own = trunk.state_dict()
    if any(key in own for key in state):
        return state, []
    children = [name for name, _ in trunk.named_children()]
    for prefix in _prefixes(state):
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for renamed in (inside, _by_place(inside, children)):
            if any(key in own for key in renamed):
                rest = len(state) - len(inside)
                left = f", {rest} tensors beside it left out" if rest else ""
                return renamed, [f"backbone: read from under the name {prefix or 'of a sequence'!r}{left}"]
    return state, []


def _prefixes(state: dict[str, Tensor]) -> list[str]:
    """None, and every known wrapper that the file has, one or two deep; the outermost first."""
    found = [""]
    for _ in range(2):
        found += [p + w for p in found for w in _WRAPPERS if any(key.startswith(p + w) for key in state)]
    return list(dict.fromkeys(found))


def _by_place(state: dict[str, Tensor], children: list[str]) -> dict[str, Tensor]:
    """Keys that begin with a child's number, under the child's name."""

    def name(key: str) -> str:
        found = re.match(r"(\d+)\.", key)
        known = found is not None and int(found[1]) < len(children)
        return f"{children[int(found[1])]}.{key[found.end() :]}" if found and known else key

    return {name(key): value for key, value in state.items()}
