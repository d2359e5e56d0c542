"""Rules of recipes that have a backbone; both stages apply them."""

from collections.abc import Iterator
from typing import Any

from penstock.augment import is_side
from penstock.backbones import names
from penstock.schedule import Clock, knobs_of, trace

PROBE = Clock(total=10_000, batch=1, epoch=1000)  # any run shows which values a curve starts and ends with


def channels_agree(recipe: Any) -> Iterator[str]:
    if recipe.backbone.channels != recipe.data.channels:
        yield (
            f"data.channels: {recipe.data.channels} here and {recipe.backbone.channels} in backbone.channels; "
            "they must agree"
        )


def patches_divide(recipe: Any) -> Iterator[str]:
    """Sizes on a curve are rounded on their way; where it starts and ends, the patch must divide them."""
    name = recipe.backbone.name
    patch = names.patch_of(name, recipe.backbone.options) if names.takes_any_size(name) else None
    if patch is None:
        return
    sides = {f"augment.{knob}": value for knob, value in knobs_of(recipe.augment).items() if is_side(knob)}
    sizes = {key: {points[0][1], points[-1][1]} for key, points in trace(sides, PROBE).items()}
    sizes["monitor.size"] = {recipe.monitor.size or patch[0]}
    for key, values in sizes.items():
        for size in sorted(values):
            side = next((side for side in patch if size % side), None)
            if side:
                near = max(round(size / side), 1) * side
                yield f"{key}: a patch of {side} pixels does not divide images of {size:g}; {near} would do"
