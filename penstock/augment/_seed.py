"""Randomness keyed by (seed, position, view): the same pixels whatever the ranks, workers or restarts."""

import random

import numpy as np
import torch

MASK = (1 << 64) - 1


def splitmix64(value: int) -> int:
    """One output of SplitMix64 (Steele, Lea and Flood 2014) for the state `value`, a number in [0, 2^64)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def key(*parts: int) -> int:
    """A 64-bit key of several numbers, sensitive to each and to their order."""
    state = 0
    for part in parts:
        state = splitmix64(state ^ (part & MASK))
    return state


def seed_sample(*parts: int) -> None:
    """Point every generator that transforms use (torch, random, NumPy's legacy one) at the key of `parts`."""
    state = key(*parts)
    torch.default_generator.manual_seed(state)
    random.seed(state)
    np.random.seed(state & 0xFFFFFFFF)
