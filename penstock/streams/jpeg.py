"""What a JPEG file's header says, by a walk over its segments. Pixels are decoded elsewhere."""

import io
from typing import NamedTuple

from PIL import Image

ORIENTATION = 0x0112  # the Exif tag
BASELINE, FRAMES, SCAN, RESTARTS, APP1 = 0xC0, {0xC0, 0xC1, 0xC2}, 0xDA, 0xDD, 0xE1


class Header(NamedTuple):
    """Sizes are those stored, before the orientation is applied."""

    height: int
    width: int
    orientation: int  # Exif's, 1 to 8; 1 is upright
    height_at: int  # offset of the height's two bytes
    step: int  # rows that are coded together where the file is coded once, from top to bottom; else 0


def read_header(data: bytes) -> Header | None:
    """The header; None when it is damaged or of a rare kind, which Pillow may yet read."""
    place, oriented, restarts, frame = 2, False, False, None
    end = len(data) - 4
    while place < end and data[place] == 0xFF:
        kind = data[place + 1]
        if kind == 0xFF:  # a fill byte
            place += 1
            continue
        length = data[place + 2] << 8 | data[place + 3]
        if kind in FRAMES and place + 9 < end and length >= 8 + 3 * data[place + 9]:
            frame = place
        elif kind == RESTARTS:
            restarts = restarts or data[place + 4 : place + 6] != b"\0\0"
        elif kind == APP1:
            oriented = oriented or _may_turn(data[place + 4 : place + 2 + length])
        elif kind == SCAN:
            return None if frame is None else _header(data, frame, place, oriented, restarts)
        place += 2 + length
    return None


def _may_turn(segment: bytes) -> bool:
    return segment[:6] == b"Exif\0\0" or b"tiff:Orientation" in segment


def _header(data: bytes, frame: int, scan: int, oriented: bool, restarts: bool) -> Header | None:
    height, width = data[frame + 5] << 8 | data[frame + 6], data[frame + 7] << 8 | data[frame + 8]
    components = data[frame + 9]
    if not (height and width):
        return None
    once = data[frame + 1] == BASELINE and data[scan + 4] == components and not restarts
    step = 8 * max(data[frame + 11 + 3 * number] & 15 for number in range(components)) if once and components else 0
    orientation = _orientation(data) if oriented else 1
    return Header(height, width, orientation, frame + 5, step) if orientation else None


def _orientation(data: bytes) -> int:
    """1 to 8, or 0 where the tags cannot be read."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            found = image.getexif().get(ORIENTATION, 1)
            return found if found in range(2, 9) else 1
    except Exception:  # Pillow's parsers raise nearly anything on damaged input
        return 0


def ended_early(data: bytes, header: Header, rows: int) -> bytearray:
    """The same file with a frame of fewer rows: decoders stop there, and then find bytes they did not expect."""
    shorter = bytearray(data)
    shorter[header.height_at : header.height_at + 2] = rows.to_bytes(2, "big")
    return shorter
