"""Random resized crop and mirroring: all the augmentation MAE needs (He et al. 2021)."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from penstock.augment import Box, Whole, _pixels
from penstock.augment._options import Ratio, Share, Side
from penstock.recipe import Block


class CropFlip:
    """One view: a random box resized to a square, mirrored half of the time."""

    class Config(Block):
        name: Literal["crop_flip"] = "crop_flip"
        size: Side = Field(224, description="side of the view in pixels; may follow a curve")
        scale: Share = Field((0.2, 1.0), description="share of the image's area, from and to")
        ratio: Ratio = Field((3 / 4, 4 / 3), description="width over height, from and to")
        interpolation: Literal["bilinear", "bicubic"] = "bicubic"
        flip: float = Field(0.5, ge=0, le=1, description="probability of mirroring")

    views = 1

    def __init__(self, config: "CropFlip.Config"):
        self.config = config

    def box(self, height: int, width: int, index: int, knobs: Mapping[str, float]) -> Box:
        return _pixels.random_box(height, width, self.config.scale, self.config.ratio)

    def view(self, image: np.ndarray, index: int, knobs: Mapping[str, float], whole: Whole | None = None) -> Tensor:
        size = int(knobs["size"])
        options = self.config
        return _pixels.crop_flip(image, size, options.scale, options.ratio, options.interpolation, options.flip, whole)
