"""Where a shard differs from the bytes that were packed.

The index has a checksum for each image. Between two images lie only padding, headers and small members, and each such
gap is looked at by itself, so one damaged header hides no other damage.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from mmap import mmap

import numpy as np

from penstock.streams.sets.index import EXTRA, Sample, label_of
from penstock.streams.sets.manifest import Shard
from penstock.streams.sets.tar import BLOCK, TarError, member_at, padded


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong: in which file, at which sample, from which byte of the file on, and what."""

    file: str
    sample: str
    byte: int | None
    what: str


@dataclass(frozen=True)
class Gap:
    """The bytes from the end of one image to the start of the next, or to the end of the tar."""

    start: int
    end: int
    before: str  # key of the sample whose image ends here; empty at the start of the tar
    after: str  # key of the sample whose image begins at the end; empty at the end of the tar
    labels: Mapping[str, int]  # of both

    def __str__(self) -> str:
        return f"between {self.before or 'the start'} and {self.after or 'the end'}"


def locate(shard: Shard, records: np.ndarray, data: mmap | bytes) -> list[Damage]:
    """What is damaged in a shard that differs from its checksum; at least one finding."""
    found: list[Damage] = []
    labels: dict[str, int] = {}
    start, before = 0, ""
    for record in records:
        key, offset, size = record["key"].decode(), int(record["offset"]), int(record["size"])
        labels = {before: labels.get(before, -1), key: int(record["label"])}
        found += _in_gap(shard.name, data, Gap(start, offset, before, key, labels))
        payload = data[offset : offset + size]
        if len(payload) < size:
            found.append(Damage(shard.name, key, offset, f"cut off: {len(payload):,} of {size:,} bytes are left"))
        elif zlib.crc32(payload) != record["crc"]:
            found.append(Damage(shard.name, key, offset, f"the image's {size:,} bytes differ from their checksum"))
        found += _in_extras(shard.name, data, key, record)
        start, before = offset + size, key
    found += _in_gap(shard.name, data, Gap(start, shard.bytes, before, "", labels))
    if len(data) > shard.bytes:
        found.append(Damage(shard.name, before, shard.bytes, f"{len(data) - shard.bytes:,} bytes too many at the end"))
    if not found:
        what = "bytes changed in members other than images and class numbers, which have no checksum of their own"
        found.append(Damage(shard.name, "", None, what))
    return found


def _in_extras(file: str, data: mmap | bytes, key: str, record: np.void) -> Iterator[Damage]:
    for name in (name for name in record.dtype.names or () if name.startswith(EXTRA)):
        offset, size = int(record[name]["offset"]), int(record[name]["size"])
        if offset and zlib.crc32(data[offset : offset + size]) != record[name]["crc"]:
            what = f"the {size:,} bytes of its {name.removeprefix(EXTRA)} differ from their checksum"
            yield Damage(file, key, offset, what)


def _in_gap(file: str, data: mmap | bytes, gap: Gap) -> Iterator[Damage]:
    neighbours = " or ".join(key for key in (gap.before, gap.after) if key)
    if gap.end > len(data):
        if gap.start <= len(data):  # further on, the images themselves are missing
            yield Damage(file, neighbours, len(data), f"cut off {gap}")
        return
    position = padded(gap.start)
    if place := _not_zero(data, gap.start, position):
        yield Damage(file, gap.before, place, f"the padding after the image of {gap.before} is not zero")
    while position < gap.end:
        header = data[position : position + BLOCK]
        if not gap.after and not header.strip(b"\0"):
            if place := _not_zero(data, position, gap.end):
                yield Damage(file, gap.before, place, f"the end mark after {gap.before} is not zero")
            return
        try:
            member = member_at(data, position, gap.before or "the start")
        except TarError:
            what = f"damaged header {gap}" if gap.after else f"damaged header or end mark after {gap.before}"
            yield Damage(file, neighbours, position, what)
            return
        if member.offset == gap.end:  # the header of the next image
            return
        if member.end > gap.end:
            yield Damage(file, neighbours, position, f"the header of {member.name} has another size")
            return
        key, _, kind = member.name.rpartition(".")
        if place := _not_zero(data, member.offset + member.size, member.end):
            whose = key if key in gap.labels else neighbours
            yield Damage(file, whose, place, f"the padding after {member.name} is not zero")
        if kind.lower() == "cls" and key in gap.labels:
            try:
                label: object = label_of(Sample(key, {"cls": member}), data)
            except TarError:
                label = "no number"
            if label != gap.labels[key]:
                what = f"the label is {label}, and was packed as {gap.labels[key]}"
                yield Damage(file, key, member.offset, what)
        position = member.end


def _not_zero(data: mmap | bytes, start: int, end: int) -> int | None:
    """Place of the first byte that is not zero in [start, end), or None."""
    content = data[start:end]
    rest = content.lstrip(b"\0")
    return end - len(rest) if rest else None
