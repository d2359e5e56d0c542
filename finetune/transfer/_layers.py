"""A timm model's layers in order, and the modules that a set of frozen parameters makes up."""

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from penstock.errors import InputError
from penstock.optim import layer_numbers


def layers(model: Any) -> list[list[str]]:
    """Names of the model's parameters, layer by layer from the stem up; what timm counts to the head goes with the
    last layer, a last norm say.

    Raises:
        InputError: the model does not know its layers.
    """
    if not hasattr(model, "group_matcher"):
        raise InputError(f"transfer: {type(model).__name__} has no order of layers; use transfer=full or transfer=head")
    numbers, top = layer_numbers(model)
    last = max((number for number in numbers.values() if number < top), default=top)
    found: dict[int, list[str]] = {}
    for name, number in numbers.items():
        found.setdefault(min(number, last), []).append(name)
    return [found[number] for number in sorted(found)]


def modules_of(root: nn.Module, params: Collection[str], prefix: str = "") -> Iterator[str]:
    """The largest modules of `root` whose parameters are all in `params` (names within `root`).

    A module without parameters, a dropout say, goes with what was made before it.
    """
    within = False
    for name, child in root.named_children():
        full = f"{prefix}{name}"
        own = [f"{full}.{each}" for each, _ in child.named_parameters()]
        inside = sum(each in params for each in own)
        if own and 0 < inside < len(own):
            yield from modules_of(child, params, f"{full}.")
            within = False
            continue
        within = bool(inside) if own else within
        if within:
            yield full
