"""Bytes of an image file to pixels. Nothing here can run code from data."""

import io
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image

from penstock.augment import Whole

FactorOf = Callable[[int, int], int]  # of an image's height and width: 1, 2, 4 or 8
LARGEST = 178_956_970  # pixels; what Pillow refuses as a decompression bomb
FORMATS = ("JPEG", "PNG", "WEBP")  # the parsers a shard may reach
ORIENTATION = 0x0112  # the Exif tag
TURNS = {  # Exif orientation to the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
    return decode_smaller(data, channels, lambda height, width: 1)[0]


def decode_smaller(data: bytes, channels: int, factor_of: FactorOf) -> tuple[np.ndarray, Whole | None]:
    """As `decode`, but a JPEG at 1 / factor of its size: the DCT's low frequencies are turned into fewer pixels.

    What has to be converted or turned first is decoded whole. Other fractions of eighths than these factors are not
    used: libjpeg-turbo has no fast code for them, and they take longer than the whole.

    Returns:
        The pixels, and the size of the whole where they are fewer.
    """
    if data[:2] == b"\xff\xd8":
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            _refuse_bomb(width, height)
            if colours in ("RGB", "YCbCr", "Gray") and not _is_turned(data):
                factor = factor_of(height, width)
                whole = Whole(height, width, factor) if factor > 1 else None
                return _with_simplejpeg(data, channels, whole), whole
        except ValueError:
            pass  # Pillow tells harmless oddities, such as stray bytes, from lost pixels
    return _with_pillow(data, channels), None


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > LARGEST:
        raise DecodeError(f"its header claims {width} x {height} pixels, more than {LARGEST / 1e6:.0f} million")


def _is_turned(data: bytes) -> bool:
    if data.find(b"Exif\x00\x00", 0, 4096) < 0:
        return False
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return image.getexif().get(ORIENTATION, 1) in TURNS
    except Exception:
        return True  # let the careful path say what is wrong


def _with_simplejpeg(data: bytes, channels: int, whole: Whole | None) -> np.ndarray:
    smallest = {}
    if whole:  # exactly this size is then what the largest fitting reduction gives
        smallest = {"min_height": -(-whole.height // whole.factor), "min_width": -(-whole.width // whole.factor)}
    return simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY", strict=True, **smallest)


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
