"""A timm model's layers in order, and the modules that a set of frozen parameters makes up."""

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from penstock.errors import InputError


def layers(model: Any) -> list[list[str]]:
    """Names of the model's parameters, layer by layer from the stem up, as timm's `group_matcher` orders them.

    A norm after the last layer belongs to that layer.

    Raises:
        InputError: the model does not know its layers.
    """
    from timm.models import group_parameters

    if not hasattr(model, "group_matcher"):
        raise InputError(f"transfer: {type(model).__name__} has no order of layers; use transfer=full or transfer=head")
    found = group_parameters(model, model.group_matcher(coarse=False))
    ordered = [list(found[index]) for index in sorted(found)]
    top = ordered[-1]
    if len(ordered) > 1 and all(name.split(".")[0] in ("norm", "fc_norm") for name in top):
        ordered[-2:] = [ordered[-2] + top]
    return ordered


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
