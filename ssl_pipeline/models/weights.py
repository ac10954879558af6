"""Published weights: every key of a network must fit, or an error names it."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.vision_transformer import interpolate_embeddings

from ssl_pipeline.config.base import ConfigError
from ssl_pipeline.models.checkpoint_file import find_network, read_tensors
from ssl_pipeline.models.torchvision_backbones import adapt_input_conv, first_convolution

WEIGHTS_FILES = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin", ".ckpt", ".torch")


def is_file_name(weights: str) -> bool:
    """Whether ``weights`` means a file rather than an official name; a file of any ending does if it is there."""
    return weights.endswith(WEIGHTS_FILES) or "/" in weights or Path(weights).is_file()


def official_entry(name: str, weights: str) -> Any:
    """The member of torchvision's enum.

    Raises:
        ConfigError: the network has no official weights, or none of that name.
    """
    try:
        known = get_model_weights(name)
    except ValueError:
        raise ConfigError(
            f"`backbone.weights`: torchvision has no official weights for {name!r}: give a file, or null."
        ) from None
    if weights not in known.__members__:
        raise ConfigError(
            f"`backbone.weights`: {name} has no official weights {weights!r}. Known: {', '.join(known.__members__)}; "
            "or give a file (.safetensors, .pth)."
        )
    return known[weights]


def read_weights(name: str, weights: str) -> dict[str, Tensor]:
    """A network's state dict by official name; or all tensors of a file, by their dotted names."""
    if is_file_name(weights):
        return read_tensors(Path(weights).expanduser())
    entry = official_entry(name, weights)
    try:
        state: dict[str, Tensor] = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except pickle.UnpicklingError as error:  # a file in the cache is not checked against its hash
        raise ConfigError(
            f"`backbone.weights`: the file kept of {weights} of {name} holds more than tensors, and no code is ever run from one: "
            "remove it from torch's cache ($TORCH_HOME/hub/checkpoints), it is fetched anew."
        ) from error
    except (URLError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"`backbone.weights`: {weights} of {name} can't be downloaded ({error}). On a machine without a network copy "
            "the file there and give `backbone.weights=FILE`."
        ) from error
    return state


def load_published(
    trunk: nn.Module, name: str, weights: str, key: str | None, classifier: tuple[str, ...], channels: int
) -> list[str]:
    """Loads published weights into a network, in place, and fits its stem to the images; returns notes for the log.

    Args:
        trunk: for RGB images, without its classifier.
        name: of the network.
        weights: an official name or a file.
        key: of a file with several networks, the part.
        classifier: prefixes of the keys that are dropped.
        channels: of the images.

    Raises:
        ConfigError: there are no such weights, or they do not fit.
    """
    what, notes = f"`backbone.weights` {weights}", list[str]()
    state = read_weights(name, weights)
    if is_file_name(weights):
        state, notes = find_network(trunk, state, what, key)
    kernels = state.get(f"{first_convolution(trunk)[0]}.weight")
    fits = channels == 3 or (kernels is not None and kernels.ndim == 4 and kernels.shape[1] == channels)
    if channels != 3 and fits:  # only for the shape: the file has kernels for these images
        adapt_input_conv(trunk, channels)
    notes += load_trunk(trunk, state, classifier, what)
    if not fits:
        notes.append(adapt_input_conv(trunk, channels))
    return notes


def load_trunk(trunk: nn.Module, state: dict[str, Tensor], classifier: tuple[str, ...], what: str) -> list[str]:
    """Loads a library's state dict into a network whose classifier was cut off, in place; returns notes for the log.

    Its own loader may read what older releases wrote: published transformers call their MLPs' layers otherwise, and published
    batch norms lack counters. What it leaves over is an error.

    Raises:
        ConfigError: naming keys that are missing, unknown, or of another shape.
    """
    kept = {key: value for key, value in state.items() if not key.startswith(classifier)}
    notes = [f"{what}: {len(state) - len(kept)} classifier tensors left out"] if len(kept) < len(state) else []
    position, own = "encoder.pos_embedding", trunk.state_dict()
    if position in kept and position in own and kept[position].shape != own[position].shape:
        size, patch = int(trunk.image_size), int(trunk.patch_size)  # type: ignore[arg-type]
        kept = dict(interpolate_embeddings(size, patch, kept))
        notes.append(f"{what}: position embeddings interpolated to {size} px")
    reshaped = [key for key in own if key in kept and own[key].shape != kept[key].shape]
    try:
        left = trunk.load_state_dict({k: v for k, v in kept.items() if k not in reshaped}, strict=False)
    except RuntimeError as error:  # a translated tensor has another shape
        raise ConfigError(f"{what} is of another architecture: {error}") from error
    _refuse(what, [key for key in left.missing_keys if key not in reshaped], left.unexpected_keys, reshaped)
    return notes


def load_strictly(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Loads a state dict of which every key must fit.

    Raises:
        ConfigError: naming the first keys that do not, and how many they are.
    """
    own = module.state_dict()
    _refuse(
        what,
        [key for key in own if key not in state],
        [key for key in state if key not in own],
        [key for key in own if key in state and own[key].shape != state[key].shape],
    )
    module.load_state_dict(state)


def _refuse(what: str, missing: list[str], unknown: list[str], reshaped: list[str]) -> None:
    faults = {"missing": missing, "unknown": unknown, "of another shape": reshaped}
    found = [
        f"{len(keys)} {'key' if len(keys) == 1 else 'keys'} {how} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for how, keys in faults.items()
        if keys
    ]
    if found:
        raise ConfigError(
            f"{what} is of another architecture: {'; '.join(found)}. Build the architecture that it was saved from"
            " (`backbone.name`, `stem`, `width`), or give other weights."
        )


def digest(module: nn.Module) -> str:
    """A digest that changes when a weight does."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        found.update(name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
