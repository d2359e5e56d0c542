"""Policies that draw their own operations, on PIL images: timm's and torchvision's, built once for each setting.

timm's are RandAugment (Cubuk et al. 2020), AugMix (Hendrycks et al. 2020) and 3-Augment (Touvron et al. 2022, DeiT
III); torchvision's is TrivialAugment (Müller and Hutter 2021). Either is loaded when a policy of its is first built.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal

from PIL import Image

from penstock.augment._pixels import mean_colour

Policy = Callable[[Image.Image], Image.Image]
Name = Literal["none", "randaugment", "trivial", "augmix", "three_augment"]
Interpolation = Literal["bilinear", "bicubic", "random"]

MAGNITUDES = {"randaugment": 9.0, "augmix": 3.0}  # where the recipe gives none: DeiT's, and the AugMix paper's
MOST = 10.0  # of a magnitude, in timm's scale
AUGMIX_TRANSLATION = 0.3  # share of the side; RandAugment's is timm's 0.45


@lru_cache(maxsize=8)  # a magnitude that follows a curve has another value at every step
def build(
    name: Name, magnitude: float, std: float, ops: int, increasing: bool, interpolation: Interpolation, channels: int
) -> Policy:
    """The policy as a function from a PIL image (RGB, or L for one channel) to another of the same size.

    Draws come from Python's, NumPy's and torch's global generators. Pixels from outside the image get ImageNet's mean
    colour, in TrivialAugment black, as in the published recipes.
    """
    if name == "trivial":
        return _trivial(interpolation)
    hparams: dict[str, Any] = {"img_mean": mean_colour(channels) if channels == 3 else mean_colour(channels)[0]}
    if interpolation != "random":
        hparams["interpolation"] = Image.Resampling[interpolation.upper()]
    from timm.data import auto_augment as timm

    if name == "randaugment":
        hparams["magnitude_std"] = std
        kinds = timm.rand_augment_choices("", increasing=increasing)
        return timm.RandAugment(_posterizing(timm.rand_augment_ops(magnitude, hparams=hparams, transforms=kinds)), ops)
    if name == "augmix":
        hparams |= {"translate_pct": AUGMIX_TRANSLATION, "magnitude_std": float("inf")}  # uniform up to the magnitude
        return timm.AugMixAugment(_posterizing(timm.augmix_ops(magnitude, hparams)))
    return timm.auto_augment_transform("3a", hparams)


def _posterizing(ops: list[Any]) -> list[Any]:
    """timm's operations, able to keep no bit at all, as at magnitude 10; Pillow 13 refuses what once gave black."""
    for op in ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = partial(_posterize, op.aug_fn)
    return ops


def _posterize(known: Callable[..., Image.Image], image: Image.Image, bits: int, **rest: Any) -> Image.Image:
    return known(image, bits, **rest) if bits > 0 else Image.new(image.mode, image.size)


def _trivial(interpolation: Interpolation) -> Policy:
    import random

    from torchvision.transforms.v2 import InterpolationMode, TrivialAugmentWide

    modes = ("bilinear", "bicubic") if interpolation == "random" else (interpolation,)
    kinds = [TrivialAugmentWide(interpolation=InterpolationMode(mode)) for mode in modes]
    return kinds[0] if len(kinds) == 1 else lambda image: random.choice(kinds)(image)
