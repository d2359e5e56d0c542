"""The supervised recipes' augmentation: crop, flip, a policy, colours, random erasing; each part can be left out.

Published settings: DeiT `policy: randaugment, magnitude: 9, erase: 0.25`; "ResNet strikes back" A2 magnitude 7 and A3
magnitude 6; torchvision `policy: trivial, erase: 0.1, erase_mode: const, interpolation: bilinear`; DeiT III
`policy: three_augment, color_jitter: 0.3`, for short runs with `crop: simple`; CIFAR `crop: simple, padding: constant`.
"""

import random
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from penstock.augment import Box, Whole, _erasing, _pixels, _policies
from penstock.augment._options import Ratio, Share, Side
from penstock.recipe import Block
from penstock.schedule import Clock, Knob, trace

Change = _policies.Policy
BLUR = (0.1, 2.0)  # standard deviation in pixels, from and to


class Standard:
    """One view. The order is timm's: crop, flip, policy, jitter, greyscale, blur, solarize, erase.

    On greyscale images saturation, hue and greyscale change nothing; everything else works as on colours.
    """

    class Config(Block):
        name: Literal["standard"] = "standard"
        size: Side = Field(224, description="side of the view in pixels; may follow a curve")
        crop: Literal["random_resized", "simple"] = Field(
            "random_resized", description="simple: short side resized to `size`, padded, a square cut out anywhere"
        )
        scale: Share = Field((0.08, 1.0), description="random_resized: share of the image's area")
        ratio: Ratio = Field((3 / 4, 4 / 3), description="random_resized: width over height")
        pad: int = Field(4, ge=0, description="simple: pixels added on each side")
        padding: Literal["reflect", "constant"] = Field("reflect", description="simple: mirrored edges, or black")
        interpolation: _policies.Interpolation = Field("bicubic", description="random: one of the two for each view")
        flip: float = Field(0.5, ge=0, le=1, description="probability of mirroring")
        policy: _policies.Name = Field("none", description="operations drawn for each view")
        magnitude: float | None = Field(
            None, ge=0, le=10, description="of randaugment (null is 9) and augmix (null is 3), up to 10"
        )
        magnitude_std: float = Field(0.5, ge=0, description="randaugment: standard deviation of the magnitude")
        ops: int = Field(2, ge=1, description="randaugment: operations drawn, each then done half of the time")
        increasing: bool = Field(True, description="randaugment: every operation is stronger at higher magnitude")
        color_jitter: float = Field(0.0, ge=0, description="most change of brightness, contrast and saturation")
        hue: float = Field(0.0, ge=0, le=0.5, description="most change of hue in the jitter, in turns")
        color_jitter_prob: float = Field(1.0, ge=0, le=1, description="probability of the jitter")
        grayscale: float = Field(0.0, ge=0, le=1, description="probability of greyscale")
        blur: float = Field(0.0, ge=0, le=1, description="probability of Gaussian blur")
        solarize: float = Field(0.0, ge=0, le=1, description="probability of solarization")
        erase: float = Field(0.0, ge=0, le=1, description="probability of erasing a box")
        erase_mode: _erasing.Fill = Field("pixel", description="pixel: filled with noise; const: with the mean colour")
        erase_area: Share = Field((0.02, 1 / 3), description="share of the view that is erased")
        strength: Knob = Field(
            1.0,
            description="factor on magnitudes, jitter and probabilities (of trivial and three_augment: the probability "
            "of the policy), all but crop and flip; 0 leaves them out; may follow a curve",
        )

        @field_validator("strength")
        @classmethod
        def _not_negative(cls, strength: Any) -> Any:
            if _lowest(strength) < 0:
                raise ValueError(f"must not fall below 0, but reaches {_lowest(strength):g}")
            return strength

        @model_validator(mode="after")
        def _fits(self) -> "Standard.Config":
            if self.magnitude is not None and self.policy not in _policies.MAGNITUDES:
                raise ValueError(
                    f"magnitude: policy {self.policy} has none; leave it out, or set policy=randaugment or augmix"
                )
            if self.crop == "simple" and self.padding == "reflect" and self.pad >= _lowest(self.size):
                raise ValueError(
                    f"pad: {self.pad} pixels cannot be mirrored in a view of {_lowest(self.size):g}; make pad smaller"
                )
            return self

    views = 1

    def __init__(self, config: "Standard.Config"):
        self.config = config
        if config.policy != "none":
            self._policy(1.0, channels=3)  # loads timm or torchvision here, once, rather than in every worker

    def box(self, height: int, width: int, index: int, knobs: Mapping[str, Any]) -> Box:
        if self.config.crop == "simple":
            return 0, 0, height, width
        self._interpolation()  # is drawn before the box
        return _pixels.random_box(height, width, self.config.scale, self.config.ratio)

    def view(self, image: np.ndarray, index: int, knobs: Mapping[str, Any], whole: Whole | None = None) -> Tensor:
        options, strength = self.config, knobs["strength"]
        view = self._crop(image, knobs["size"], whole)
        changes = list(self._changes(strength, channels=len(view)))
        if changes:
            picture = _picture(view)
            for change in changes:
                picture = change(picture)
            view = _pixels.planes(np.array(picture).reshape(*view.shape[1:], len(view)))
        if _happens(options.erase * strength):
            view = _erasing.erase(view, options.erase_mode, options.erase_area)
        return view

    def _crop(self, image: np.ndarray, size: int, whole: Whole | None) -> Tensor:
        options, interpolation = self.config, self._interpolation()
        if options.crop == "simple":
            return _pixels.padded_crop(image, size, options.pad, options.padding, interpolation, options.flip, whole)
        return _pixels.crop_flip(image, size, options.scale, options.ratio, interpolation, options.flip, whole)

    def _interpolation(self) -> str:
        chosen = self.config.interpolation
        return random.choice(("bilinear", "bicubic")) if chosen == "random" else chosen

    def _changes(self, strength: float, channels: int) -> Iterator[Change]:
        """The changes that this view draws, in order."""
        options = self.config
        if options.policy in _policies.MAGNITUDES:
            if strength > 0:  # at magnitude 0 some operations, such as equalize, would still act
                yield self._policy(strength, channels)
        elif options.policy != "none" and _happens(strength):
            yield self._policy(strength, channels)
        if strength * max(options.color_jitter, options.hue) > 0 and _happens(options.color_jitter_prob):
            yield _jitter(options.color_jitter * strength, min(options.hue * strength, 0.5))
        if _happens(options.grayscale * strength):
            yield _grayscale
        if _happens(options.blur * strength):
            yield _blur
        if _happens(options.solarize * strength):
            yield ImageOps.solarize

    def _policy(self, strength: float, channels: int) -> Change:
        options = self.config
        magnitude = _policies.MAGNITUDES.get(options.policy, 0.0) if options.magnitude is None else options.magnitude
        return _policies.build(
            options.policy,
            min(magnitude * strength, _policies.MOST),
            options.magnitude_std,
            options.ops,
            options.increasing,
            options.interpolation,
            channels,
        )


def _picture(view: Tensor) -> Image.Image:
    """A PIL image of [C, H, W]. Merging planes takes a fifth of the time of turning the array into [H, W, C]."""
    bands = [Image.fromarray(plane) for plane in view.numpy()]
    return Image.merge("RGB", bands) if len(bands) == 3 else bands[0]


def _happens(probability: float) -> bool:
    return probability > 0 and random.random() < probability


@lru_cache(maxsize=8)
def _jitter(most: float, hue: float) -> Change:
    """Brightness, contrast, saturation and hue in random order."""
    from torchvision.transforms.v2 import ColorJitter

    return ColorJitter(most, most, most, hue)


def _grayscale(image: Image.Image) -> Image.Image:
    return image.convert("L").convert(image.mode)


def _blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*BLUR)))


def _lowest(knob: Any) -> float:
    """Of a number or a curve, over a run of any length."""
    return min(value for _, value in trace({"": knob}, Clock(total=1000, batch=1, epoch=100))[""])
