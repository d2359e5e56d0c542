"""Another source's images, re-encoded for training at small sizes."""

from functools import partial

import numpy as np
import simplejpeg
from PIL import Image

from penstock.streams.decode import ALL, Need, decode_smaller
from penstock.streams.sets.encoded import image_format, storable
from penstock.streams.sets.sources import Item, Source, WithExtras


class Smaller:
    """Images whose short side is longer than `short_side` become JPEGs of that short side; others stay as they are.

    Upright, with chroma at half the size, as most cameras store it.

    Args:
        short_side: pixels.
        quality: of the JPEGs, 1 to 100.
    """

    def __init__(self, source: Source, short_side: int, quality: int):
        # The settings of the source are part of the plan that a pack goes on with.
        vars(self).update({name: value for name, value in vars(source).items() if isinstance(value, (str, int, bool))})
        self.of = type(source).__name__
        self.source, self.short_side, self.quality = source, short_side, quality
        self.classes = source.classes
        if isinstance(source, WithExtras):
            self.extra, self.beside = source.extra, source.beside

    def items(self) -> tuple[list[Item], list[int]]:
        found = self.source.items()
        self.classes = self.source.classes
        return found

    def read(self, item: Item) -> tuple[bytes, int]:
        data, label = self.source.read(item)
        if image_format(data) is None:
            data = storable(data)[0]
        return smaller(data, self.short_side, self.quality), label

    def remarks(self) -> list[str]:
        said = self.source.remarks()
        if isinstance(self.source, WithExtras) and (kept := [s for s in self.source.extra if s != "txt"]):
            said.append(f"images became smaller, and what lies beside them stays as it is: {', '.join(kept)}")
        return said


def smaller(data: bytes, short_side: int, quality: int) -> bytes:
    """A JPEG of that short side, or the bytes as they are when the image's is no longer.

    Raises DecodeError when the image does not open all the way.
    """
    channels = 1 if image_format(data) == "jpg" and _is_grey(data) else 3
    pixels, whole = decode_smaller(data, channels, partial(_need, short_side))
    height, width = (whole.height, whole.width) if whole else pixels.shape[:2]
    if min(height, width) <= short_side:
        return data
    scale = short_side / min(height, width)
    size = max(short_side, round(width * scale)), max(short_side, round(height * scale))
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).resize(size, Image.Resampling.LANCZOS)
    shrunk = np.ascontiguousarray(np.asarray(image).reshape(size[1], size[0], channels))
    colours, chroma = ("GRAY", "Gray") if channels == 1 else ("RGB", "420")
    return simplejpeg.encode_jpeg(shrunk, quality, colours, chroma)


def _need(short_side: int, height: int, width: int) -> Need:
    """Twice the pixels that are kept, where there are more: the filter then sees no difference."""
    room = min(height, width) // (2 * short_side)
    return Need(max(factor for factor in (1, 2, 4, 8) if factor <= room)) if room else ALL


def _is_grey(data: bytes) -> bool:
    try:
        return simplejpeg.decode_jpeg_header(data)[2] == "Gray"
    except ValueError:
        return False
