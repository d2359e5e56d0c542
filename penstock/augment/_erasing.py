"""Random erasing (Zhong et al. 2020) of uint8 pixels. Draws come from Python's `random`, noise from torch."""

import math
import random
from typing import Literal

import torch
from torch import Tensor

from penstock.augment._pixels import Box, mean_colour, spread_of_colour

Fill = Literal["pixel", "const"]
LOG_ASPECT = math.log(0.3)  # height over width lies between 0.3 and 1 / 0.3


def erasing_box(height: int, width: int, area: tuple[float, float]) -> Box | None:
    """A box of a share `area` of the image, of any place; None where ten draws did not fit, as timm leaves it then."""
    for _ in range(10):
        size = random.uniform(*area) * height * width
        aspect = math.exp(random.uniform(LOG_ASPECT, -LOG_ASPECT))
        h, w = round(math.sqrt(size * aspect)), round(math.sqrt(size / aspect))
        if h < height and w < width:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    return None


def erase(view: Tensor, fill: Fill, area: tuple[float, float]) -> Tensor:
    """A copy of uint8 [C, H, W] with one box replaced.

    timm fills with N(0, 1) ("pixel") or 0 ("const") after normalisation. On uint8 that is N(mean, std) or the mean, of
    ImageNet's colours, rounded and clipped to what a pixel can hold (about 5 % of the values).
    """
    box = erasing_box(view.shape[1], view.shape[2], area)
    if box is None:
        return view
    top, left, height, width = box
    channels = len(view)
    filled = torch.tensor(mean_colour(channels), dtype=torch.float32)[:, None, None]
    if fill == "pixel":
        spread = torch.tensor(spread_of_colour(channels))[:, None, None]
        filled = filled + spread * torch.randn(channels, height, width)
    erased = view.clone()
    erased[:, top : top + height, left : left + width] = filled.round().clamp(0, 255).to(torch.uint8)
    return erased
