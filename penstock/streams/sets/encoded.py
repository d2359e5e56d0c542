"""Encoded images, as files and shards hold them: their kind, their size, the bytes to store."""

import io
import struct
from pathlib import PurePath

import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from penstock.streams.decode import DecodeError, decode

EXTENSIONS = {"jpg", "jpeg", "png", "webp"}  # kept as they are
READABLE = EXTENSIONS | {"bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "jp2", "jfif", "tga"}  # become PNG
# Parsers that files may reach: Pillow would hand others, such as EPS, to programs outside.
PARSERS = ("BMP", "GIF", "TIFF", "PPM", "JPEG2000", "TGA")
PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}


def is_image_name(name: str) -> bool:
    return PurePath(name).suffix.lower().lstrip(".") in READABLE


def image_format(data: bytes) -> str | None:
    """`jpg`, `png` or `webp` by the first bytes, else None."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels as the header gives them, without decoding; (0, 0) when it cannot be read."""
    try:
        kind = image_format(data)
        if kind == "jpg":
            height, width = simplejpeg.decode_jpeg_header(data)[:2]
            return width, height
        if kind == "png":
            return struct.unpack(">II", data[16:24])
        if kind == "webp":
            with Image.open(io.BytesIO(data), formats=("WEBP",)) as image:
                return image.size
    except Exception:  # decoders raise many types on damaged bytes
        return 0, 0
    return 0, 0


def storable(data: bytes) -> tuple[bytes, str]:
    """The bytes to store and their extension: JPEG, PNG and WebP untouched, anything else as PNG, first frame, upright.

    Raises DecodeError when the image does not open all the way.
    """
    if not data:
        raise DecodeError("the file is empty")
    kind = image_format(data)
    if kind:
        decode(data)
        return data, kind
    try:
        with Image.open(io.BytesIO(data), formats=PARSERS) as image:
            return encode_png(ImageOps.exif_transpose(image)), "png"
    except UnidentifiedImageError:
        raise DecodeError("not an image of a known kind") from None
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged input
        raise DecodeError(f"{type(error).__name__}: {error}") from None


def encode_png(image: Image.Image) -> bytes:
    """Lossless PNG; modes that PNG lacks (CMYK, float) become RGB."""
    file = io.BytesIO()
    (image if image.mode in PNG_MODES else image.convert("RGB")).save(file, "PNG")
    return file.getvalue()
