"""Randomness as a pure function of a key: the same numbers whatever the ranks, workers or restarts.

One hash, SplitMix64 (Steele, Lea and Flood 2014), for Python integers, NumPy arrays and tensors. Unlike the
libraries' generators its output can never change with a version, so orders and crops stay reproducible.
"""

import random

import numpy as np
import torch
from torch import Tensor

MASK = (1 << 64) - 1
GAMMA, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def splitmix64(value: int) -> int:
    """The hash of a number in [0, 2^64)."""
    value = (value + GAMMA) & MASK
    value = ((value ^ (value >> 30)) * MIX1) & MASK
    value = ((value ^ (value >> 27)) * MIX2) & MASK
    return value ^ (value >> 31)


def splitmix64_array(values: np.ndarray) -> np.ndarray:
    """`splitmix64` of every element of a uint64 array."""
    with np.errstate(over="ignore"):
        values = values.astype(np.uint64) + np.uint64(GAMMA)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(MIX1)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(MIX2)
        return values ^ (values >> np.uint64(31))


def key(*parts: int) -> int:
    """A 64-bit key of several numbers, sensitive to each and to their order."""
    state = 0
    for part in parts:
        state = splitmix64(state ^ (part & MASK))
    return state


def seed_sample(*parts: int) -> None:
    """Point every generator that transforms use (torch's, random's, NumPy's legacy one) at the key of `parts`."""
    state = key(*parts)
    torch.default_generator.manual_seed(state)
    random.seed(state)
    np.random.seed(state & 0xFFFFFFFF)  # noqa: NPY002 - timm's transforms draw from it


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
