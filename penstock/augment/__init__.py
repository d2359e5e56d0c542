"""Augmentations: each file is one component, which turns an image into views."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from penstock.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

AUGMENTATIONS = Registry("penstock.augment")


class Augment(Protocol):
    """What a stream needs. The config's fields typed `Knob`, `size` among them, may follow curves."""

    config: Any
    views: int

    def view(self, image: "np.ndarray", index: int, knobs: Mapping[str, float]) -> "Tensor":
        """View number `index` of an image, uint8 [H, W, C] to uint8 [C, size, size].

        `knobs` holds what the config's knobs are worth at this step; `size` is a whole number.

        Draws come from torch's, Python's or NumPy's global generator, which the caller seeds for each view. The image
        may be shared and must not be changed.
        """
        ...
