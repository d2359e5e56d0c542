"""Every kind of image file that a shard may hold, and what must be refused."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from penstock.streams.decode import DecodeError, decode

PIXELS = np.kron(np.random.default_rng(0).integers(0, 256, (6, 9, 3)), np.ones((4, 4, 1))).astype(np.uint8)  # 24 x 36


def encoded(kind: str, pixels: np.ndarray = PIXELS, mode: str | None = None, **options) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def by_pillow(data: bytes, mode: str = "RGB") -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(ImageOps.exif_transpose(image).convert(mode))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}])
def test_jpeg_as_pillow_decodes_it(options):
    data = encoded("JPEG", quality=92, **options)
    assert decode(data).dtype == np.uint8
    assert np.abs(decode(data).astype(int) - by_pillow(data)).max() <= 2
    grey = decode(data, channels=1)  # the luma that the file stores; Pillow computes it from RGB, clipped
    assert grey.shape == (24, 36, 1)
    assert np.abs(grey.astype(int) - by_pillow(data, "L")).mean() < 0.5


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_kinds(kind):
    data = encoded(kind, lossless=True)
    assert np.array_equal(decode(data), PIXELS)
    assert decode(data, channels=1).shape == (24, 36, 1)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_other_modes_of_png(mode):
    data = encoded("PNG", mode=mode)
    assert np.array_equal(decode(data), by_pillow(data))


def test_palette_with_transparency():
    data = encoded("PNG", mode="P", transparency=3)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[:, :, :3])


def test_sixteen_bits_are_scaled_not_clipped():
    wide = (np.arange(24 * 36, dtype=np.uint16).reshape(24, 36) * 75).astype(np.uint16)
    pixels = decode(encoded("PNG", wide))
    assert pixels.shape == (24, 36, 3)
    assert np.array_equal(pixels[:, :, 0], wide >> 8)


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of uint16 [H, W, 1 to 4 channels] by hand: Pillow writes none with 16 bits a colour."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    kinds = {1: 0, 2: 4, 3: 2, 4: 6}

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 16, kinds[channels], 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_a_colour(channels):
    wide = np.random.default_rng(0).integers(0, 1 << 16, (9, 14, channels), dtype=np.uint16)
    wide[:, :, -1] |= 0xFF00 if channels in (2, 4) else 0  # transparency is dropped, not blended in
    pixels = decode(png16(wide))
    colours = wide[:, :, :3] if channels >= 3 else np.repeat(wide[:, :, :1], 3, axis=2)
    assert np.array_equal(pixels, colours >> 8)


def test_cmyk_holds_inverted_inks_whether_it_says_so_or_not():
    """As Adobe stores it, with its segment; Pillow takes that for granted without it, too."""
    data = encoded("JPEG", mode="CMYK", quality=95)
    place = data.index(b"\xff\xee\x00\x0eAdobe")
    plain = data[:place] + data[place + 16 :]
    for each in (data, plain):
        assert np.abs(decode(each).astype(int) - by_pillow(each)).max() <= 2
        assert np.abs(decode(each).astype(int) - PIXELS).mean() < 2


def test_an_orientation_far_into_the_file_and_one_in_xmp():
    data = encoded("JPEG", quality=95, exif=exif(6))
    place = data.index(b"\xff\xe1")
    profile = b"\xff\xe2" + struct.pack(">H", 60_002) + b"\0" * 60_000
    far = data[:place] + profile + data[place:]
    note = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    upright = encoded("JPEG", quality=95)
    xmp = upright[:2] + b"\xff\xe1" + struct.pack(">H", len(note) + 2) + note + upright[2:]
    for each in (far, xmp):
        assert decode(each).shape == by_pillow(each).shape == (36, 24, 3)
        assert np.abs(decode(each).astype(int) - by_pillow(each)).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True}
    data = encoded(kind, exif=exif(orientation), **options)
    expected = by_pillow(data)
    assert decode(data).shape == expected.shape == ((24, 36, 3) if orientation < 5 else (36, 24, 3))
    assert np.abs(decode(data).astype(int) - expected).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=40, lossless=True)
    assert np.array_equal(decode(file.getvalue()), PIXELS)


def test_the_kind_is_told_from_the_bytes():
    assert np.array_equal(decode(encoded("PNG")), PIXELS)  # ImageNet holds a PNG named .JPEG


def test_a_harmless_oddity_is_read():
    data = encoded("JPEG")
    place = data.index(b"\xff\xda")  # stray bytes between segments are a warning of libjpeg's, and lose nothing
    odd = data[:place] + b"\x00" * 7 + data[place:]
    assert np.abs(decode(odd).astype(int) - by_pillow(data)).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_cut_file_is_refused_wherever_it_is_cut(kind):
    data = encoded(kind)
    last = len(data) - 40  # the very end holds checksums and markers, without which every pixel can be there
    for length in [*range(0, last, max(1, last // 60)), last]:
        with pytest.raises(DecodeError):
            decode(data[:length])


def bomb_jpeg() -> bytes:
    data = bytearray(encoded("JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", 50_000, 50_000)
    return bytes(data)


def bomb_png() -> bytes:
    data = bytearray(encoded("PNG"))
    data[16:24] = struct.pack(">II", 50_000, 50_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize("data", [bomb_jpeg(), bomb_png()], ids=["jpeg", "png"])
def test_a_bomb_is_refused_by_its_header(data):
    with pytest.raises(DecodeError, match=r"50000 x 50000|bomb"):
        decode(data)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("the data was executed",))


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xd8", b"\xff\xd8\xff", b"not an image", pickle.dumps(Trap()), encoded("GIF"), encoded("TIFF")],
    ids=["empty", "two bytes", "three bytes", "text", "pickle", "gif", "tiff"],
)
def test_what_is_no_image_is_refused(data):
    with pytest.raises(DecodeError):
        decode(data)
