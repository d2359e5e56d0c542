"""SplitMix64 (Steele, Lea and Flood 2014) for Python integers and NumPy arrays; needs no torch.

Unlike the libraries' generators its output can never change with a version.
"""

import numpy as np

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


def permutation(count: int, seed: int) -> np.ndarray:
    """A fixed permutation of range(count), int64 [count]: places sorted by the hash of (seed, place)."""
    hashes = splitmix64_array(np.arange(count, dtype=np.uint64) ^ np.uint64(key(seed)))
    return np.argsort(hashes, kind="stable")
