"""What a sample has beside its image and class number: captions, boxes, masks, arrays.

The index holds place and checksum of each such member, in one column `extra.SUFFIX` per kind, so a stream reads those
it was asked for and walks no headers. They come as they were stored: augmentation does not turn or crop a mask.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from penstock.errors import InputError
from penstock.streams.reader import ShardReader
from penstock.streams.sets.encoded import EXTENSIONS
from penstock.streams.sets.index import EXTRA, SUFFIX
from penstock.streams.sets.storage import Fault

TEXTS = {"txt", "text", "caption"}
KINDS = "txt, text or caption (text), json, cls (a number), npy (an array), png, jpg, jpeg or webp (pixels)"
RESERVED = {"views", "label"}  # of a stage's samples


def check_names(wanted: Mapping[str, str]) -> None:
    """Raise ValueError unless these names and suffixes can be asked for (`data.extra`)."""
    for name, suffix in wanted.items():
        if not name.isidentifier() or name in RESERVED:
            raise ValueError(f"{name!r} is no name for what is handed over; write a word such as caption: txt")
        if not SUFFIX.fullmatch(suffix):
            raise ValueError(f"{name}: {suffix!r} is no suffix; write it as it ends in the tar, small and without dot")
        if _kind(suffix) is None:
            raise ValueError(f"{name}: members that end in {suffix!r} are not read; those that are: {KINDS}")


class Extras:
    """Reads the members that a stream was asked for.

    Args:
        wanted: suffix by the name it is handed over under, such as {"caption": "txt"}.
    """

    def __init__(self, reader: ShardReader, wanted: Mapping[str, str]):
        self.reader, self.wanted = reader, dict(wanted)

    def read(self, shard: int, sample: int) -> dict[str, Any]:
        """Decoded members by name, None where the sample has none; raises Fault for what is damaged.

        Text is str; json what it says; an image or array uint8 (or its own type) [H, W], [H, W, C] or its own shape.
        """
        row, record = self.reader.row(shard, sample), self.reader.record(shard, sample)
        found: dict[str, Any] = {}
        for name, suffix in self.wanted.items():
            place = row[EXTRA + suffix] if EXTRA + suffix in (row.dtype.names or ()) else None
            if place is None or not place["offset"]:
                found[name] = None
                continue
            where = replace(record, offset=int(place["offset"]), size=int(place["size"]), crc=int(place["crc"]))
            try:
                found[name] = decoded(suffix, self.reader.payload(shard, where))
            except Fault as fault:
                raise Fault(f"its {suffix}: {fault}", fault.kind) from fault
            except Exception as error:  # parsers raise nearly anything on damaged bytes
                raise Fault(f"its {suffix} cannot be used: {type(error).__name__}: {error}", "extra") from None
        return found


def decoded(suffix: str, data: bytes) -> Any:
    """A member by its suffix's last part. Nothing is unpickled or evaluated; raises whatever parsers raise."""
    kind = _kind(suffix)
    if kind == "text":
        return data.decode()
    if kind == "json":
        return json.loads(data)
    if kind == "number":
        return int(data)
    if kind == "array":
        return _array(data)
    assert kind == "pixels"
    return _pixels(data)


def _kind(suffix: str) -> str | None:
    last = suffix.rsplit(".", 1)[-1]
    if last in TEXTS:
        return "text"
    return {"json": "json", "cls": "number", "npy": "array"}.get(last, "pixels" if last in EXTENSIONS else None)


def _array(data: bytes) -> np.ndarray:
    """Of a `.npy`, whose header must describe just the bytes that follow: else it could ask for all memory."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(
        version
    )
    if read_header is None:
        raise ValueError(f"npy version {version}")
    shape, fortran, dtype = read_header(file)
    count = int(np.prod(shape, dtype=object))
    if dtype.hasobject or min(shape, default=0) < 0 or count * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"its header claims {dtype} {list(shape)}, and {len(data) - file.tell()} bytes follow")
    flat = np.frombuffer(data, dtype, count, file.tell()).copy()
    return flat.reshape(shape, order="F" if fortran else "C")


def _pixels(data: bytes) -> np.ndarray:
    """As they are stored: a palette's numbers, 16-bit values and transparency stay; no Exif turn is applied."""
    from PIL import Image

    from penstock.streams.decode import FORMATS, LARGEST

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > LARGEST:
            raise ValueError(f"its header claims {image.width} x {image.height} pixels")
        pixels = np.array(image)
    return pixels.astype(np.uint8) if pixels.dtype == bool else pixels


def check_present(reader: ShardReader, wanted: Mapping[str, str]) -> None:
    """Raise InputError when no shard that is looked at has one of the members asked for."""
    missing = set(wanted.values())
    seen: set[str] = set()
    total = len(reader.manifest.shards)
    shards = range(0, total, -(-total // reader.manifest.storage.shards_looked_at) or 1)
    for shard in shards:
        if not missing:
            return
        held = [name.removeprefix(EXTRA) for name in reader.names(shard) if name.startswith(EXTRA)]
        seen.update(held)
        missing.difference_update(held)
    if missing:
        has = (
            f"its samples have {', '.join(sorted(seen))}" if seen else "its samples have nothing beside image and label"
        )
        raise InputError(
            f"data.extra: no sample of {reader.manifest.root} has a member {', '.join(sorted(missing))}"
            f"{'' if len(shards) == total else f' in the {len(shards)} shards that were looked at'}; {has}. If "
            "an older Penstock made the index, which lists none of them, delete manifest.json and index again"
        )
