"""Multi-crop: a few large views and many small ones (Caron et al. 2020, SwAV; Caron et al. 2021, DINO).

The defaults are DINO's for ResNet-50 and ViT at 224 pixels. SwAV: `scale: [0.14, 1], jitter_most: [0.8, 0.8, 0.8, 0.2],
blur: [0.5, 0.5, 0.5], solarize: [0, 0, 0], local_views: 6, local_scale: [0.05, 0.14]`.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field, field_validator
from torch import Tensor

from penstock.augment import Box, Whole, _pixels
from penstock.augment._distort import Jitter, distort
from penstock.augment._options import Ratio, Share, Side
from penstock.recipe import Block

PerKind = tuple[float, float, float]
KERNEL = 17  # taps that hold all of the widest blur, of a standard deviation of 2 pixels


class MultiCrop:
    """Global views come first, then local ones; each is cropped, mirrored, jittered, blurred and solarized."""

    class Config(Block):
        name: Literal["multi_crop"] = "multi_crop"
        size: Side = Field(224, description="side of global views in pixels; may follow a curve")
        local_size: Side = Field(96, description="side of local views in pixels; may follow a curve")
        global_views: int = Field(2, ge=1, description="large views of each image")
        local_views: int = Field(8, ge=0, description="small views of each image")
        scale: Share = Field((0.4, 1.0), description="share of the image's area in a global view, from and to")
        local_scale: Share = Field((0.05, 0.4), description="share of the image's area in a local view, from and to")
        ratio: Ratio = Field((3 / 4, 4 / 3), description="width over height, from and to")
        interpolation: Literal["bilinear", "bicubic"] = "bicubic"
        flip: float = Field(0.5, ge=0, le=1, description="probability of mirroring")
        jitter: float = Field(0.8, ge=0, le=1, description="probability of colour jitter")
        jitter_most: tuple[float, float, float, float] = Field(
            (0.4, 0.4, 0.2, 0.1), description="most change of brightness, contrast, saturation, hue (at most 0.5 turns)"
        )
        grayscale: float = Field(0.2, ge=0, le=1, description="probability of greyscale")
        blur: PerKind = Field(
            (1.0, 0.1, 0.5), description="probability of blur: of the first view, other global ones, local ones"
        )
        solarize: PerKind = Field((0.0, 0.2, 0.0), description="probability of solarization, of the same three")

        @field_validator("blur", "solarize")
        @classmethod
        def _probabilities(cls, values: PerKind) -> PerKind:
            if not all(0 <= value <= 1 for value in values):
                raise ValueError("three probabilities, each between 0 and 1")
            return values

        @field_validator("jitter_most")
        @classmethod
        def _a_jitter(cls, most: Jitter) -> Jitter:
            if min(most) < 0 or most[3] > 0.5:
                raise ValueError("changes are at least 0, and that of hue is at most 0.5, half of the circle")
            return Jitter(*most)

    def __init__(self, config: "MultiCrop.Config"):
        self.config = config
        self.views = config.global_views + config.local_views

    def side(self, index: int, knobs: Mapping[str, float]) -> int:
        return int(knobs["local_size" if self._is_local(index) else "size"])

    def box(self, height: int, width: int, index: int, knobs: Mapping[str, float]) -> Box:
        return _pixels.random_box(height, width, self._scale(index), self.config.ratio)

    def view(self, image: np.ndarray, index: int, knobs: Mapping[str, float], whole: Whole | None = None) -> Tensor:
        options, size, scale = self.config, self.side(index, knobs), self._scale(index)
        view = _pixels.crop_flip(image, size, scale, options.ratio, options.interpolation, options.flip, whole)
        kind = 2 if self._is_local(index) else min(index, 1)
        return distort(
            view,
            Jitter(*options.jitter_most),
            options.jitter,
            options.grayscale,
            options.blur[kind],
            min(KERNEL, 2 * size - 1),  # reflected edges reach no further than the view
            options.solarize[kind],
        )

    def _is_local(self, index: int) -> bool:
        return index >= self.config.global_views

    def _scale(self, index: int) -> Share:
        return self.config.local_scale if self._is_local(index) else self.config.scale
