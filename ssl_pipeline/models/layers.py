"""Which layer a parameter of an encoder belongs to: what layer-wise learning rates are counted by."""

from __future__ import annotations

from ssl_pipeline.models.encoder import Encoder

_TRUNK = "backbone.trunk."


def layer_of(encoder: Encoder) -> dict[str, int]:
    """The layers of an encoder's parameters, by name.

    As BEiT and MAE number them (Bao et al. 2022; He et al. 2022): the stem or the embeddings are 0, the blocks 1 to N, and what
    follows the last block (a final norm, the neck) is N + 1, with the head. timm's trunks are grouped as timm groups them.
    """
    numbers = {name: number for number, names in enumerate(encoder.backbone.layers) for name in names}
    return {
        name: _number(name.removeprefix(_TRUNK), numbers, head_layer(encoder)) for name, _ in encoder.named_parameters()
    }


def head_layer(encoder: Encoder) -> int:
    """The number of the head's own layer: N + 1 for N blocks."""
    return len(encoder.backbone.layers)


def _number(parameter: str, numbers: dict[str, int], head: int) -> int:
    """The number of the module that a parameter is in, or of the parameter itself."""
    name = parameter
    while name not in numbers and "." in name:
        name = name.rpartition(".")[0]
    return numbers.get(name, head)
