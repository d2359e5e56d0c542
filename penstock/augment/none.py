"""No augmentation: the image, resized where it has another size. For digits and other sets that must not be moved."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from penstock.augment import _pixels
from penstock.augment._options import Side
from penstock.recipe import Block


class NoAugmentation:
    """One view: the whole image, resized to a square."""

    class Config(Block):
        name: Literal["none"] = "none"
        size: Side = Field(32, description="side of the view in pixels; may follow a curve")
        interpolation: Literal["bilinear", "bicubic"] = "bicubic"

    views = 1

    def __init__(self, config: "NoAugmentation.Config"):
        self.config = config

    def view(self, image: np.ndarray, index: int, knobs: Mapping[str, float]) -> Tensor:
        size = int(knobs["size"])
        return _pixels.resize(_pixels.planes(image), size, size, self.config.interpolation)
