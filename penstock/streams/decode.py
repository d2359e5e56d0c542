"""Bytes of an image file to pixels. Nothing here can run code from data."""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from penstock.augment import Whole
from penstock.streams.jpeg import ORIENTATION, Header, ended_early, read_header

LARGEST = 178_956_970  # pixels; what Pillow refuses as a decompression bomb
FORMATS = ("JPEG", "PNG", "WEBP")  # the parsers a shard may reach
TURNS = {  # Exif orientation to the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)


class Need(NamedTuple):
    """What an image's views need of it."""

    factor: int = 1  # the most it may be decoded smaller by: 1, 2, 4 or 8
    rows: int | None = None  # of the whole image from its top; None is all


NeedOf = Callable[[int, int], Need]  # of an image's height and width
ALL = Need()


class DecodePlan(NamedTuple):
    """Which decoder takes an image, and how much of it is decoded."""

    decoder: str  # "simplejpeg" or "pillow"
    reason: str  # for people; the same words for images that are taken alike
    whole: Whole | None = None  # where fewer pixels are decoded than there are
    rows: int | None = None  # decoded from the top, in pixels of the whole; None is all
    header: Header | None = None  # where simplejpeg decodes


class DecodeError(Exception):
    """The bytes are not an image that can be used; the message is the reason."""

    kind = "undecodable"  # as of a Fault


def decode(data: bytes, channels: int = 3) -> np.ndarray:
    """Pixels, uint8 [H, W, channels], of a JPEG, PNG or WebP file; RGB, or luma for one channel.

    The kind is told from the bytes, not from a name. An Exif orientation is applied, 16-bit values are scaled to 8,
    transparency is dropped (as `Image.convert("RGB")` does), and of an animation the first frame is taken.

    Raises:
        DecodeError: unreadable, truncated, or larger than `LARGEST` pixels.
    """
    return decode_smaller(data, channels, lambda height, width: ALL)[0]


def decode_smaller(data: bytes, channels: int, need_of: NeedOf) -> tuple[np.ndarray, Whole | None]:
    """As `decode`, but of a JPEG no more than is needed.

    At 1 / factor of its size the DCT's low frequencies are turned into fewer pixels. Other fractions of eighths than
    these factors are not used: libjpeg-turbo has no fast code for them, and they take longer than the whole. Rows
    below the last one needed are left out; those above are, bit for bit, what they would be with them.

    Returns:
        The pixels, and the size of the whole where they are fewer.
    """
    plan = decode_plan(data, need_of)
    if plan.header is not None:
        try:
            return _with_simplejpeg(data, channels, plan), plan.whole
        except ValueError:
            pass  # Pillow tells harmless oddities, such as stray bytes, from lost pixels
    return _with_pillow(data, channels), None


def decode_plan(data: bytes, need_of: NeedOf) -> DecodePlan:
    """How `decode_smaller` takes an image; raises DecodeError when its header claims too many pixels."""
    if data[:2] != b"\xff\xd8":
        return DecodePlan("pillow", "not a JPEG: whole")
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        return DecodePlan("pillow", f"a header that simplejpeg does not read ({error}): whole")
    _refuse_bomb(width, height)
    if colours not in ("RGB", "YCbCr", "Gray"):
        return DecodePlan("pillow", f"{colours} has to be converted: whole")
    header = read_header(data)
    if header is None or (header.height, header.width) != (height, width):
        return DecodePlan("pillow", "an unusual header: whole")
    turned = header.orientation > 1
    if header.orientation in SIDEWAYS:
        height, width = width, height
    factor, rows = need_of(height, width)
    ends = None
    if rows is not None and header.step and not turned:  # chroma between rows, and rounded edges, reach a little on
        ends = -(-(rows + 2 * factor) // header.step) * header.step
    if ends is None or ends >= height:
        ends = None
    reason = f"{'turned by its Exif tag, ' if turned else ''}{f'1/{factor} of its size' if factor > 1 else 'full size'}"
    reason += ", upper rows" if ends else ", all rows"
    whole = Whole(height, width, factor) if factor > 1 or ends else None
    return DecodePlan("simplejpeg", reason, whole, ends, header)


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > LARGEST:
        raise DecodeError(f"its header claims {width} x {height} pixels, more than {LARGEST / 1e6:.0f} million")


def _with_simplejpeg(data: bytes, channels: int, plan: DecodePlan) -> np.ndarray:
    assert plan.header is not None
    factor, rows = plan.whole.factor if plan.whole else 1, plan.rows or plan.header.height
    height, width = -(-rows // factor), -(-plan.header.width // factor)
    # Exactly this size is then what the largest fitting reduction gives.
    smallest = {"min_height": height, "min_width": width} if factor > 1 else {}
    colours = "RGB" if channels == 3 else "GRAY"
    if not plan.rows:
        return _upright(simplejpeg.decode_jpeg(data, colours, strict=True, **smallest), plan.header.orientation)
    pixels = np.empty((height, width, channels), dtype=np.uint8)
    shorter = ended_early(data, plan.header, rows)
    try:
        simplejpeg.decode_jpeg(shorter, colours, buffer=pixels, strict=True, **smallest)
    except ValueError as error:
        # The pixels are there when the first complaint is about the rest of the file; of lost pixels comes another.
        if "extraneous bytes before marker" not in str(error):
            raise
    return pixels


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an Exif orientation, [H, W, C] to [H, W, C] or [W, H, C]."""
    if orientation == 1:
        return pixels
    if orientation in SIDEWAYS:
        pixels = pixels.transpose(1, 0, 2)
    down, across = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(pixels[:: -1 if down else 1, :: -1 if across else 1])


def _with_pillow(data: bytes, channels: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            _refuse_bomb(*file.size)
            turn = TURNS.get(file.getexif().get(ORIENTATION, 1))
            image: Image.Image = file
            if image.mode.startswith("I"):  # 16-bit greyscale, which convert() would clip at 255
                wide = np.asarray(image).astype(np.int64)
                image = Image.fromarray((wide >> 8).clip(0, 255).astype(np.uint8))
            elif image.mode not in ("RGB", "L"):
                image = image.convert("RGBA" if "transparency" in image.info else "RGB")
            image = image.convert("RGB" if channels == 3 else "L")
            if turn is not None:
                image = image.transpose(turn)
            pixels = np.array(image)
    except DecodeError:
        raise
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged input
        raise DecodeError(f"{type(error).__name__}: {error}") from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
