"""Augmentations: each file is one component, which turns an image into views."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from penstock.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

AUGMENTATIONS = Registry("penstock.augment")
Box = tuple[int, int, int, int]  # top, left, height, width in pixels


def is_side(knob: str) -> bool:
    """Whether a knob of an augmentation is a side in pixels, by its name."""
    return knob == "size" or knob.endswith("_size")


class Whole(NamedTuple):
    """The image of which a part was decoded: pixel i of that covers factor * i to factor * (i + 1).

    Where an Exif orientation was undone it does so within less than `factor` pixels.
    """

    height: int
    width: int
    factor: int  # 1, 2, 4 or 8; the decoded part is ceil(width / factor) pixels wide and may end below the lowest box


class Augment(Protocol):
    """What a stream needs. The config's fields typed `Knob`, `size` among them, may follow curves.

    A knob that is a side in pixels (`is_side`) comes as a whole number, and from a curve as a multiple of what the
    backbone needs.
    """

    config: Any
    views: int  # of each image; of the class, unless the config decides

    def view(self, image: "np.ndarray", index: int, knobs: Mapping[str, float]) -> "Tensor":
        """View number `index` of an image, uint8 [H, W, C] to uint8 [C, size, size].

        `knobs` holds what the config's knobs are worth at this step. Views of other sizes are told by `Sized`.

        Draws come from torch's, Python's or NumPy's global generator, which the caller seeds for each view. The image
        may be shared and must not be changed.
        """
        ...


@runtime_checkable
class Sized(Augment, Protocol):
    """An augmentation whose views differ in size."""

    def side(self, index: int, knobs: Mapping[str, float]) -> int:
        """Side of view number `index` in pixels."""
        ...


def side_of(augment: Augment, index: int, knobs: Mapping[str, float]) -> int:
    """Side of view number `index` in pixels; where an augmentation does not say, all have the knob `size`."""
    side = getattr(augment, "side", None)  # isinstance(augment, Sized) takes longer than a crop's draws
    return int(knobs["size"]) if side is None else side(index, knobs)


def views_of(config: Any) -> int:
    """How many views of each image an augmentation of this config makes."""
    kind = AUGMENTATIONS.get(config.name)
    return kind.views if hasattr(kind, "views") else kind(config).views


@runtime_checkable
class Boxed(Augment, Protocol):
    """An augmentation that can say beforehand what it needs of an image, which may then be decoded smaller."""

    def box(self, height: int, width: int, index: int, knobs: Mapping[str, float]) -> Box:
        """What `view` will resize to about its own size, of an image of this size. It must use no pixel outside.

        The generators are seeded as for `view`, which draws the same box.
        """
        ...

    def view(self, image: "np.ndarray", index: int, knobs: Mapping[str, float], whole: Whole | None = None) -> "Tensor":
        """As of every augmentation. With `whole`, a part of it was decoded; boxes are drawn in the whole one."""
        ...
