"""Types of options that several augmentations share."""

import math
from typing import Annotated, Any

from pydantic import AfterValidator

from penstock.schedule import Knob, bounds


def _has_pixels(side: Any) -> Any:
    if not 1 <= min(bounds(side)) <= max(bounds(side)) < math.inf:
        raise ValueError("a view is at least 1 pixel wide, at every step")
    return side


def _ordered(span: tuple[float, float]) -> tuple[float, float]:
    if not 0 < span[0] <= span[1] < math.inf:
        raise ValueError("write the lower value first, above 0, such as [0.4, 1.0]")
    return span


def _within_the_image(span: tuple[float, float]) -> tuple[float, float]:
    if span[1] > 1:
        raise ValueError("a share of the area is at most 1")
    return span


Side = Annotated[Knob, AfterValidator(_has_pixels)]  # of a view, in pixels
Ratio = Annotated[tuple[float, float], AfterValidator(_ordered)]  # width over height, from and to
Share = Annotated[tuple[float, float], AfterValidator(_ordered), AfterValidator(_within_the_image)]  # of the area
