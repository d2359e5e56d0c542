"""Weights, images and noise made by a formula, so that golden numbers need no stored tensors."""

import math
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from penstock import keyed


def tensor(name: str, shape: Iterable[int]) -> Tensor:
    """Numbers in [-1, 1), float64, that depend on the name and the shape alone."""
    shape = tuple(shape)
    numbers = keyed.uniform(zlib.crc32(name.encode()), 0, torch.arange(1), math.prod(shape))
    return numbers.double().mul(2).sub(1).view(shape)


def weight(name: str, shape: Iterable[int]) -> Tensor:
    """A parameter of a sensible size: norms near 1, matrices by their fan-in, the rest small."""
    shape = tuple(shape)
    values = tensor(name, shape)
    if len(shape) >= 2 and not name.endswith("token"):
        return values * (3 / math.prod(shape[1:])) ** 0.5
    return 1 + 0.2 * values if "norm" in name and name.endswith("weight") else 0.2 * values


def summary(name: str, gradient: Tensor) -> list[float]:
    """Norm of a gradient, and its product with a fixed direction."""
    gradient = gradient.double()
    return [gradient.norm().item(), (gradient * tensor(f"direction of {name}", gradient.shape)).sum().item()]
