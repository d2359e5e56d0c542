"""Mutations of tars, manifests and indices: a seeded, endless supply of damage and malice.

Every mutation is a pure function of (seed, number), so `mutations(seed, number, number + 1)` brings a failure back.
"""

import gzip
import io
import json
import os
import pickle
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

BLOCK = 512
# Whatever webdataset 1.0.2 or its kin would hand to an unpickler, and the other types its decoder knows.
SUFFIXES = ["pkl", "pickle", "pyd", "pth", "pt", "joblib", "dill", "npz", "npy", "ten", "tb", "mp", "msg", "cbor"]
NAMES = [
    "../escape.png", "/tmp/escape.png", "a/../../escape.png", "..", ".", "", "/", "a\\..\\b.png", "C:\\x.png",
    "file:x.png", "pipe:touch escape.png", "http://x/y.png", "x\ny.png", "img.001.png", "img.002.png", "noextension",
    ".png", "a.b.c.d.png", "KEY.PNG", "é" * 40 + ".png", "n" * 99 + ".png", "__meta__.json", "__x__/a.png",
    "a.png/b.png", "sample0.png", "sample1.cls", "a.JpEg", "a.png.cls", "a.cls.png", "a.seg.npy", "a\x7f.png", " .png",
]  # fmt: skip
LABELS = [
    b"", b"-5", b"1e400", b"NaN", b"true", b"null", b"[1]", b"{}", b'{"label": 3}', b" 3 ", b"\xff\xfe", b"9" * 5000,
    b"[" * 2000, b"0x10", b"2147483648", b"3.0", b"three", b'"3"', b"\0\0\0\0", b"-1", b"+1", b"01",
]  # fmt: skip
TYPES = [b"0", b"\0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"L", b"K", b"S", b"x", b"g", b"X", b"N", b"D", b"M"]
NUMBERS = [b"00000000000\0", b"77777777777\0", b"-0000000001\0", b"\x80" + bytes(10) + b"\x40", b"\xff" * 12,
           b"zzzzzzzzzzz\0", b"00000001000 ", b" " * 12, b"\x80" + b"\x7f" * 11]  # fmt: skip
VALUES: list[Any] = [
    None, True, -1, 0, 1, 2, 10**6, 2**31, 2**64, 2**70, 1.5, 1e308, "", "x", "../x", "/etc/passwd", "file:///etc/passwd",
    "pipe:touch escape", "s3://bucket/x", "a\0b", "a\nb", "é", [], {}, [[]], ["x"], {"x": 1}, "ffff", "-1", "g" * 16,
]  # fmt: skip


class Bomb:
    """Its pickle makes the folder that PENSTOCK_TRAP names."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["PENSTOCK_TRAP"],)


@dataclass(frozen=True)
class Part:
    """A member of a tar with its own headers, as bytes."""

    name: str
    head: bytes  # all headers, extended ones too
    content: bytes

    @property
    def raw(self) -> bytes:
        return self.head + self.content + bytes(-len(self.content) % BLOCK)


@dataclass(frozen=True)
class Mutation:
    """`plain` damage leaves headers that do not fit their checksums; other changes make another valid tar, perhaps."""

    name: str
    data: bytes
    plain: bool


def parts_of(data: bytes) -> list[Part]:
    """The members of an intact tar, by Python's own reader."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [
            Part(item.name, data[item.offset : item.offset_data], data[item.offset_data : item.offset_data + item.size])
            for item in tar.getmembers()
        ]


def joined(parts: list[Part]) -> bytes:
    return b"".join(part.raw for part in parts) + bytes(2 * BLOCK)


def member(name: str, content: bytes, form: int = tarfile.USTAR_FORMAT, **info: Any) -> Part:
    """A new member; `info` are attributes of TarInfo."""
    item = tarfile.TarInfo(name)
    item.size = len(content)
    for key, value in info.items():
        setattr(item, key, value)
    try:
        head = item.tobuf(form, "utf-8", "surrogateescape")
    except ValueError:  # too long for the format
        head = item.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    return Part(name, head, content)


def summed(head: bytes) -> bytes:
    """A header block with the checksum that fits it."""
    total = sum(head[:148]) + sum(head[156:BLOCK]) + 8 * 32
    return head[:148] + b"%06o\0 " % total + head[156:]


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG whose header claims any size."""
    header = struct.pack(">II", width, height) + b"\x08\x02\0\0\0"
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def text_bomb() -> bytes:
    """A PNG with a compressed comment of 64 MB."""
    body = b"Comment\0\0" + zlib.compress(bytes(64 << 20), 9)
    whole = png_claiming(8, 8)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return whole[:33] + chunk + whole[33:]


TEXT_BOMB = text_bomb()


class Tars:
    """Mutations of one intact tar."""

    def __init__(self, data: bytes):
        self.data, self.parts = data, parts_of(data)
        self.headers = [place for place in range(0, len(data), BLOCK) if data[place + 257 : place + 262] == b"ustar"]
        self.pickle = pickle.dumps(Bomb())

    def mutation(self, seed: int, number: int) -> Mutation:
        cuts = len(self.data) // BLOCK + 1
        if number < cuts:
            return Mutation(f"cut at {number * BLOCK}", self.data[: number * BLOCK], True)
        rng = random.Random(f"{seed} {number}")
        if rng.random() < 0.45:
            what, data = rng.choice(PLAIN)(self, self.data, rng)
            return Mutation(f"{number}: {what}", data, True)
        words, parts = [], list(self.parts)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            if parts:
                word, parts = rng.choice(CRAFTED)(self, parts, rng)
                words.append(word)
        return Mutation(f"{number}: {', '.join(words)}", joined(parts), False)


# Damage: what happens to bytes.


def flip(tars: Tars, data: bytes, rng: random.Random) -> tuple[str, bytes]:
    place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
    return f"bit flipped at {place}", data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]


def flip_header(tars: Tars, data: bytes, rng: random.Random) -> tuple[str, bytes]:
    place = rng.choice(tars.headers) + rng.randrange(BLOCK)
    byte = rng.choice([0, 255, rng.randrange(256)])
    return f"header byte {place} set to {byte}", data[:place] + bytes([byte]) + data[place + 1 :]


def cut(tars: Tars, data: bytes, rng: random.Random) -> tuple[str, bytes]:
    place = rng.randrange(len(data))
    return f"cut at {place}", data[:place]


def zeros(tars: Tars, data: bytes, rng: random.Random) -> tuple[str, bytes]:
    place, length = rng.randrange(0, len(data), BLOCK), BLOCK * rng.randrange(1, 5)
    return f"{length} zeros from {place}", (data[:place] + bytes(length) + data[place + length :])[: len(data)]


def noise(tars: Tars, data: bytes, rng: random.Random) -> tuple[str, bytes]:
    place, length = rng.randrange(len(data)), rng.randrange(1, 2000)
    return f"{length} noise from {place}", (data[:place] + rng.randbytes(length) + data[place + length :])[: len(data)]


def lost_blocks(tars: Tars, data: bytes, rng: random.Random) -> tuple[str, bytes]:
    place, length = rng.randrange(0, len(data), BLOCK), BLOCK * rng.randrange(1, 4)
    return f"{length} lost at {place}", data[:place] + data[place + length :]


def more(tars: Tars, data: bytes, rng: random.Random) -> tuple[str, bytes]:
    extra = rng.choice([b"\0", bytes(BLOCK), rng.randbytes(700), data])
    return f"{len(extra)} more at the end", data + extra


PLAIN = [flip, flip_header, flip_header, cut, zeros, noise, lost_blocks, more]


# Other tars: valid headers around odd things.


def swap(tars: Tars, parts: list[Part], rng: random.Random) -> tuple[str, list[Part]]:
    one, two = rng.randrange(len(parts)), rng.randrange(len(parts))
    parts = list(parts)
    parts[one], parts[two] = parts[two], parts[one]
    return f"members {one} and {two} swapped", parts


def swap_content(tars: Tars, parts: list[Part], rng: random.Random) -> tuple[str, list[Part]]:
    one, two = rng.randrange(len(parts)), rng.randrange(len(parts))
    first, second = parts[one], parts[two]
    changed = list(parts)
    changed[one], changed[two] = member(first.name, second.content), member(second.name, first.content)
    return f"contents of {one} and {two} swapped", changed


def drop(tars: Tars, parts: list[Part], rng: random.Random) -> tuple[str, list[Part]]:
    one = rng.randrange(len(parts))
    return f"member {one} dropped", parts[:one] + parts[one + 1 :]


def double(tars: Tars, parts: list[Part], rng: random.Random) -> tuple[str, list[Part]]:
    one, place = rng.randrange(len(parts)), rng.randrange(len(parts) + 1)
    return f"member {one} again at {place}", [*parts[:place], parts[one], *parts[place:]]


def rename(tars: Tars, parts: list[Part], rng: random.Random) -> tuple[str, list[Part]]:
    one, name = rng.randrange(len(parts)), rng.choice(NAMES)
    form = rng.choice([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    return f"member {one} named {name!r}", [*parts[:one], member(name, parts[one].content, form), *parts[one + 1 :]]


def new_pickle(tars: Tars, parts: list[Part], rng: random.Random) -> tuple[str, list[Part]]:
    one, suffix = rng.randrange(len(parts)), rng.choice(SUFFIXES)
    suffix = rng.choice([suffix, suffix.upper(), f"{suffix}.gz", f"x.{suffix}", f"{suffix}.GZ"])
    content = gzip.compress(tars.pickle, mtime=0) if suffix.lower().endswith("gz") else tars.pickle
    stem = parts[one].name.rpartition(".")[0]
    return f"a pickle .{suffix} at {one}", [*parts[: one + 1], member(f"{stem}.{suffix}", content), *parts[one + 1 :]]


def new_content(tars: Tars, parts: list[Part], rng: random.Random) -> tuple[str, list[Part]]:
    one = rng.randrange(len(parts))
    old = parts[one]
    if old.name.endswith("cls"):
        content = rng.choice([*LABELS, tars.pickle])
    else:
        content = rng.choice(
            [b"", tars.pickle, b"<html>404</html>", png_claiming(50_000, 50_000), png_claiming(0, 8), TEXT_BOMB,
             png_claiming(2**31 - 1, 1), gzip.compress(bytes(1 << 20)), rng.randbytes(600), old.content[:-20],
             old.content[: len(old.content) // 2], old.content + b"tail", old.content[:30] + rng.randbytes(9)]
        )  # fmt: skip
    return f"content of {one} is {content[:12]!r}", [*parts[:one], member(old.name, content), *parts[one + 1 :]]


def other_type(tars: Tars, parts: list[Part], rng: random.Random) -> tuple[str, list[Part]]:
    one, kind = rng.randrange(len(parts)), rng.choice(TYPES)
    old, link = parts[one], rng.choice(["", "../x", "/etc/passwd", parts[0].name])
    content = old.content if rng.random() < 0.5 else b""
    new = member(old.name, content, tarfile.GNU_FORMAT, linkname=link)
    head = summed(new.head[:156] + kind + new.head[157:])
    return f"member {one} of type {kind!r}", [*parts[:one], Part(old.name, head, content), *parts[one + 1 :]]


def header_field(tars: Tars, parts: list[Part], rng: random.Random) -> tuple[str, list[Part]]:
    """Any byte of a header, with the checksum that fits; the size's bytes most of all."""
    one = rng.randrange(len(parts))
    head = bytearray(parts[one].head)
    start = len(head) - BLOCK
    if rng.random() < 0.5:
        head[start + 124 : start + 136] = rng.choice([*NUMBERS, b"%011o\0" % rng.randrange(4000)])
    else:
        head[start + rng.randrange(BLOCK)] = rng.randrange(256)
    fixed = bytes(head[:start]) + summed(bytes(head[start:]))
    return f"header of {one} changed", [
        *parts[:one],
        Part(parts[one].name, fixed, parts[one].content),
        *parts[one + 1 :],
    ]


def extended(tars: Tars, parts: list[Part], rng: random.Random) -> tuple[str, list[Part]]:
    """A pax or GNU header before a member: other names, sizes, sparse maps, nonsense."""
    one = rng.randrange(len(parts))
    key, value = rng.choice(
        [("path", "../escape.png"), ("path", parts[0].name), ("path", "n" * 300 + ".png"), ("size", "3"), ("size", "x"),
         ("size", "99999999999999"), ("GNU.sparse.major", "1"), ("GNU.sparse.name", "other.png"), ("linkpath", "/etc"),
         ("GNU.sparse.map", "0,1"), ("mtime", "1.5"), ("hdrcharset", "BINARY"), ("SCHILY.xattr.user.x", "y"),
         ("comment", "\0"), ("path", "é.png"), ("GNU.sparse.realsize", "100")]
    )  # fmt: skip
    body = f" {key}={value}\n".encode()
    length = next(n for n in range(len(body), len(body) + 9) if n == len(body) + len(str(n)))
    record = str(length).encode() + body
    if rng.random() < 0.2:
        record = rng.choice([record[:-1], b"999" + record, b"0" + record, record * 2, b"\xff" + record, b"7 =\n"])
    kind = rng.choice([b"x", b"x", b"x", b"g", b"L", b"K"])
    head = member("PaxHeader", record).head
    header = Part("", summed(head[:156] + kind + head[157:]), record)
    again = [header] if rng.random() < 0.15 else []
    return f"{kind!r} {record[:40]!r} before {one}", [*parts[:one], *again, header, *parts[one:]]


CRAFTED = [
    swap, swap_content, drop, double, rename, rename, new_pickle, new_pickle, new_content, new_content, other_type,
    header_field, header_field, extended, extended,
]  # fmt: skip


# Manifests and indices. `blessed` ones carry checksums that fit, as someone with bad intentions would see to.


def identity_of(content: dict) -> str:
    """The manifest's own checksum, transcribed."""
    import hashlib

    kept = {key: value for key, value in content.items() if key not in ("pack", "identity")}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def places_in(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of everything in a JSON document."""
    if path:
        yield path
    items: Any = (
        content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    )
    for key, value in items:
        yield from places_in(value, (*path, key))


def manifest_mutation(text: str, seed: int, number: int) -> Mutation:
    rng = random.Random(f"manifest {seed} {number}")
    data = text.encode()
    if rng.random() < 0.2:
        place = rng.randrange(len(data))
        changed = rng.choice([data[:place], data[:place] + rng.randbytes(3) + data[place + 3 :], b"", b"[" * 100_000])
        return Mutation(f"manifest {number}: bytes at {place}", changed, True)
    content = json.loads(text)
    words = []
    for _ in range(rng.choice([1, 1, 2])):
        path = rng.choice(list(places_in(content)))
        holder = content
        for key in path[:-1]:
            holder = holder[key]
        how = rng.choice(["set", "set", "set", "delete", "double", "near"])
        value = holder[path[-1]]
        if how == "set":
            holder[path[-1]] = rng.choice(VALUES)
        elif how == "delete":
            del holder[path[-1]]
        elif how == "near" and isinstance(value, int):
            holder[path[-1]] = value + rng.choice([-1, 1, 100])
        elif how == "double" and isinstance(holder, list):
            holder.append(value)
        elif isinstance(holder, dict):
            holder["unknown"] = value
        words.append(f"{how} {'.'.join(map(str, path))}")
    if blessed := rng.random() < 0.8:
        content["identity"] = identity_of(content)
    return Mutation(f"manifest {number}: {', '.join(words)}", json.dumps(content).encode(), not blessed)


def index_mutation(data: bytes, seed: int, number: int) -> Mutation:
    rng = random.Random(f"index {seed} {number}")
    kind = rng.choice(["flip", "cut", "field", "field", "field", "other", "noise"])
    records = np.load(io.BytesIO(data))
    if kind == "flip":
        place = rng.randrange(len(data))
        return Mutation(f"index {number}: byte {place}", data[:place] + rng.randbytes(1) + data[place + 1 :], False)
    if kind == "cut":
        return Mutation(f"index {number}: cut", data[: rng.randrange(len(data))], False)
    if kind == "noise":
        return Mutation(f"index {number}: noise", rng.randbytes(rng.randrange(300)), False)
    if kind == "field":
        name, row = rng.choice(list(records.dtype.names)), rng.randrange(len(records))
        if records.dtype[name].kind == "S":
            value: Any = rng.choice([b"\xff\xfe", b"", b"../x", b"\0"])
        else:
            limits = np.iinfo(records.dtype[name])
            value = rng.choice([limits.min, limits.max, 0, len(data), int(records[name][0])])
        records[name][row] = value
        return Mutation(f"index {number}: {name} of {row} is {value}", saved(records), False)
    other: Callable[[], np.ndarray] = rng.choice(
        [lambda: records[:-1], lambda: records.reshape(1, -1), lambda: np.arange(len(records)),
         lambda: records[[*records.dtype.names[1:]]].copy(), lambda: np.zeros(0, records.dtype),
         lambda: records.astype([(n, ">u8" if n == "offset" else records.dtype[n]) for n in records.dtype.names])]
    )  # fmt: skip
    return Mutation(f"index {number}: another array", saved(other()), False)


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
