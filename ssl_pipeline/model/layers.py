"""Which layer a parameter of an encoder belongs to: what layer-wise learning rates are counted by."""

from __future__ import annotations

import re

from ssl_pipeline.model.encoder import Encoder

_BLOCK = re.compile(r"^((?:[^.]+\.)*?[^.]*\d)\.[^.]+\.")  # `encoder.layers.encoder_layer_3.…`, timm's `blocks.3.…`


def layer_of(encoder: Encoder) -> dict[str, int]:
    """The layers of an encoder's parameters, by name; 0 is the one nearest to the image.

    A network with several levels counts a level, its stem in the first, as a layer; a transformer with one level counts a
    block. What follows the last of them (a final norm, the neck) belongs to it.
    """
    prefix = "backbone.trunk."
    levels = [level.modules for level in encoder.backbone.levels.values()]
    places = {module: place for place, modules in enumerate(levels) for module in modules}
    layers, current = dict[str, int](), 0
    blocks: dict[str, int] = {}
    for name, _ in encoder.named_parameters():
        own = name.removeprefix(prefix)
        if places:
            found = [place for module, place in places.items() if own.startswith(f"{module}.")]
            current = found[0] if found else len(levels) - 1
        elif (block := _BLOCK.match(own)) is not None:
            current = blocks.setdefault(block[1], len(blocks))
        layers[name] = current
    return layers
