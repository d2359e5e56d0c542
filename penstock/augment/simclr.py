"""SimCLR's two views (Chen et al. 2020, appendix A)."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from penstock.augment import Box, Whole, _pixels
from penstock.augment._distort import Jitter, distort
from penstock.augment._options import Ratio, Share, Side
from penstock.recipe import Block


class SimCLR:
    """Crop, mirror, colour jitter, greyscale, blur. For 32 x 32 images the paper takes strength 0.5 and no blur."""

    class Config(Block):
        name: Literal["simclr"] = "simclr"
        size: Side = Field(224, description="side of the views in pixels; may follow a curve")
        scale: Share = Field((0.08, 1.0), description="share of the image's area, from and to")
        ratio: Ratio = Field((3 / 4, 4 / 3), description="width over height, from and to")
        interpolation: Literal["bilinear", "bicubic"] = "bicubic"
        flip: float = Field(0.5, ge=0, le=1, description="probability of mirroring")
        jitter: float = Field(0.8, ge=0, le=1, description="probability of colour jitter")
        strength: float = Field(1.0, ge=0, le=2.5, description="of the jitter: 0.8 s in light, 0.2 s in hue")
        grayscale: float = Field(0.2, ge=0, le=1, description="probability of greyscale")
        blur: float = Field(0.5, ge=0, le=1, description="probability of blur; 0 for small images")
        solarize: float = Field(0.0, ge=0, le=1, description="probability of solarization (of the second view only)")

    views = 2

    def __init__(self, config: "SimCLR.Config"):
        self.config = config

    def box(self, height: int, width: int, index: int, knobs: Mapping[str, float]) -> Box:
        return _pixels.random_box(height, width, self.config.scale, self.config.ratio)

    def view(self, image: np.ndarray, index: int, knobs: Mapping[str, float], whole: Whole | None = None) -> Tensor:
        size = int(knobs["size"])
        options = self.config
        view = _pixels.crop_flip(image, size, options.scale, options.ratio, options.interpolation, options.flip, whole)
        solarize = options.solarize if index == 1 else 0.0
        kernel = max(3, int(size * 0.1) // 2 * 2 + 1)
        return distort(
            view, Jitter.of(options.strength), options.jitter, options.grayscale, options.blur, kernel, solarize
        )
