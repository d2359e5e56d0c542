"""The colours and sharpness of views for self-supervised learning. Draws come from Python's `random`."""

import random
from typing import Any, NamedTuple

from torch import Tensor

from penstock.augment import _pixels


class Jitter(NamedTuple):
    """The most that each is changed by: factors from 1 - b to 1 + b, the hue in turns."""

    brightness: float
    contrast: float
    saturation: float
    hue: float

    @classmethod
    def of(cls, strength: float) -> "Jitter":
        """SimCLR's, of a strength: 0.8 s in light, 0.2 s in hue."""
        return cls(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)


def distort(
    view: Tensor, jitter: Jitter, jittered: float, grayscale: float, blur: float, kernel: int, solarize: float
) -> Tensor:
    """Colour jitter, greyscale, blur and solarization of uint8 [C, H, W], each with its probability.

    On greyscale images only the last two.

    Args:
        jittered: probability of the jitter.
        kernel: taps of the blur, odd; its standard deviation lies between 0.1 and 2 pixels.
    """
    if len(view) == 3:
        view = view.contiguous()
        if random.random() < jittered:
            view = _jitter(view, jitter)
        if random.random() < grayscale:
            view = _colours().rgb_to_grayscale_image(view, num_output_channels=3)
    if random.random() < blur:
        view = _pixels.gaussian_blur(view, random.uniform(0.1, 2.0), kernel)
    if random.random() < solarize:
        view = _colours().solarize_image(view, 128)
    return view


def _colours() -> Any:
    """torchvision's functions, loaded when pixels are at hand: a recipe is checked without them."""
    import torchvision.transforms.v2.functional

    return torchvision.transforms.v2.functional


def _jitter(view: Tensor, most: Jitter) -> Tensor:
    """Brightness, contrast, saturation and hue in random order."""
    factors = [random.uniform(max(0.0, 1 - change), 1 + change) for change in most[:3]]
    hue = random.uniform(-most.hue, most.hue)
    changes = [
        lambda pixels: _colours().adjust_brightness_image(pixels, factors[0]),
        lambda pixels: _colours().adjust_contrast_image(pixels, factors[1]),
        lambda pixels: _colours().adjust_saturation_image(pixels, factors[2]),
        lambda pixels: _pixels.shift_hue(pixels, hue),
    ]
    random.shuffle(changes)
    for change in changes:
        view = change(view)
    return view
