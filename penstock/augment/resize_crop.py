"""The usual view for evaluation: short side resized, centre cropped. Draws nothing."""

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from penstock.augment import _pixels
from penstock.augment._options import Side
from penstock.recipe import Block


class ResizeCrop:
    """One view: the short side becomes size / crop_pct, then the centre is cut out."""

    class Config(Block):
        name: Literal["resize_crop"] = "resize_crop"
        size: Side = Field(224, description="side of the view in pixels; may follow a curve")
        crop_pct: float = Field(0.875, gt=0, le=1, description="share of the short side that is kept; 1 keeps it whole")
        interpolation: Literal["bilinear", "bicubic"] = "bicubic"

    views = 1

    def __init__(self, config: "ResizeCrop.Config"):
        self.config = config

    def view(self, image: np.ndarray, index: int, knobs: Mapping[str, float]) -> Tensor:
        size = int(knobs["size"])
        height, width = image.shape[:2]
        short = max(size, math.floor(size / self.config.crop_pct))
        scale = short / min(height, width)
        tall = max(short, int(height * scale)) if height > width else short
        wide = max(short, int(width * scale)) if width > height else short
        resized = _pixels.resize(_pixels.planes(image), tall, wide, self.config.interpolation)
        top, left = round((tall - size) / 2), round((wide - size) / 2)
        return resized[:, top : top + size, left : left + size]
