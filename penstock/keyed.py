"""Randomness as a pure function of a key: the same numbers whatever the ranks, workers or restarts.

One hash, SplitMix64 (Steele, Lea and Flood 2014), for Python integers, NumPy arrays and tensors. Unlike the
libraries' generators its output can never change with a version, so orders and crops stay reproducible.
"""

import random

import numpy as np
import torch
from torch import Tensor

from penstock.splitmix import GAMMA, MASK, MIX1, MIX2, key, splitmix64, splitmix64_array

__all__ = [
    "MASK",
    "key",
    "seed_sample",
    "splitmix64",
    "splitmix64_array",
    "splitmix64_tensor",
    "uniform",
]


def seed_sample(*parts: int) -> None:
    """Point every generator that transforms use (torch's, random's, NumPy's legacy one) at the key of `parts`."""
    state = key(*parts)
    torch.default_generator.manual_seed(state)
    random.seed(state)
    np.random.seed(state & 0xFFFFFFFF)  # timm's transforms draw from it


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(values: Tensor, bits: int) -> Tensor:
    return (values >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts are arithmetic; the hash needs logical ones


def splitmix64_tensor(values: Tensor) -> Tensor:
    """`splitmix64` of every element of an int64 tensor holding the same 64 bits."""
    values = values + _signed(GAMMA)
    values = (values ^ _shift(values, 30)) * _signed(MIX1)
    values = (values ^ _shift(values, 27)) * _signed(MIX2)
    return values ^ _shift(values, 31)


def uniform(seed: int, stream: int, positions: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 [B, count], keyed by (seed, stream, position).

    Args:
        stream: separates uses of one seed (masks, noise); any integer.
        positions: int64 [B], the samples' places in the order.
    """
    base = splitmix64_tensor(positions ^ _signed(key(seed, stream)))
    counters = torch.arange(count, device=positions.device, dtype=torch.int64)
    bits = splitmix64_tensor(base[:, None] ^ splitmix64_tensor(counters)[None, :])
    return _shift(bits, 40).to(torch.float32) * 2.0**-24
