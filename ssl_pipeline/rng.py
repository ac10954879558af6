"""Randomness by name: every draw is a pure function of its name, never of a generator's state.

A draw is named by ``(seed, purpose, epoch, view, draw)`` and by the sample's index. The first five give a 64-bit key
(BLAKE2b, once per batch and draw), the index selects an element of the key's SplitMix64 sequence (Steele, Lea and Flood
2014), computed for the whole batch at once on the tensor's device. Integer arithmetic is exact, so CPU and GPU agree
bit for bit, and neither the number of workers, nor the number of processes, nor a resume can change a draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Name = int | str


def _signed(value: int) -> int:
    """The two's complement reading of a 64-bit pattern: torch has no unsigned arithmetic."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


@lru_cache(maxsize=65536)
def derive_seed(*name: Name) -> int:
    """A 63-bit seed from a name.

    The parts are hashed rather than added or shifted together: torch's CPU generator keeps only the low 32 bits of a
    seed, and ``seed + epoch`` makes (1, 0) and (0, 1) the same run. Types and order of the parts count.
    """
    text = "/".join(f"{type(part).__name__}:{part}" for part in name)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's ``>>`` is arithmetic on int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash_bits(index: Tensor, key: int | Tensor) -> Tensor:
    """Element ``index`` (int64, any shape) of the SplitMix64 sequence that starts at ``key``: int64, all 64 bits well mixed.

    ``key`` is the name's hash, or int64 of several names' hashes, to be broadcast with ``index``.
    """
    x = (index + 1) * _GAMMA + key
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def permutation(count: int, *name: Name) -> Tensor:
    """A random order of ``range(count)`` that belongs to a name; int64 of shape (count,), on the CPU."""
    bits = hash_bits(torch.arange(count, dtype=torch.int64), derive_seed("permutation", *name))
    return torch.argsort(bits, stable=True)


def _unit(bits: Tensor) -> Tensor:
    """The top 24 bits as a number in [0, 1)."""
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


@dataclass(frozen=True)
class NamedRNG:
    """The named draws of a batch of samples.

    Attributes:
        index: int64 of shape (B,): which samples; its device is where draws are made.
        seed: the run's seed.
        purpose: what the draws are for, such as ``"views"``.
        epoch: the epoch the samples are seen in.
        view: which view of the sample.
    """

    index: Tensor
    seed: int
    purpose: str
    epoch: int = 0
    view: int = 0

    def bits(self, draw: str) -> Tensor:
        """64 random bits per sample, int64 of shape (B,)."""
        return hash_bits(self.index, derive_seed(self.seed, self.purpose, self.epoch, self.view, draw))

    def uniform(self, draw: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform in [low, high), float32 of shape (B,): the top 24 bits, so that 1.0 never comes."""
        return low + (high - low) * _unit(self.bits(draw))

    def uniforms(self, draws: Sequence[str], low: float = 0.0, high: float = 1.0) -> Tensor:
        """Several draws at once, which saves time where there are many: float32 of shape (B, number of draws)."""
        names = [derive_seed(self.seed, self.purpose, self.epoch, self.view, draw) for draw in draws]
        keys = torch.tensor(names, dtype=torch.int64).to(self.index.device)
        return low + (high - low) * _unit(hash_bits(self.index[:, None], keys))

    def happens(self, draw: str, probability: float) -> Tensor:
        """True with the given probability, bool of shape (B,)."""
        return self.uniform(draw) < probability
