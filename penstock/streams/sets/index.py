"""The index of a shard: where each sample's image lies, with checksum, id, label and size.

One record of `INDEX` per sample, as a plain `.npy` that is memory-mapped and never unpickled. Samples are grouped by
webdataset's own rule for names, so keys mean the same to its readers. Where samples have members beside image and
class number (captions, boxes, masks), the index has a column for each kind of them.
"""

import hashlib
import io
import json
import mmap
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from penstock.errors import InputError
from penstock.splitmix import splitmix64_array
from penstock.streams.sets.atomic import replacing
from penstock.streams.sets.encoded import EXTENSIONS, image_size
from penstock.streams.sets.manifest import Manifest, Shard
from penstock.streams.sets.storage import LocalStorage, Storage
from penstock.streams.sets.tar import Member, TarError, members

FIELDS = [
    ("offset", "<u8"),  # of the image's payload in the tar
    ("size", "<u4"),
    ("crc", "<u4"),  # crc32 of the payload
    ("id", "<u8"),  # see sample_id
    ("label", "<i4"),  # -1: none
    ("width", "<u4"),  # 0: the header could not be read
    ("height", "<u4"),
]
EXTRA = "extra."  # begins the name of a column of other members, such as extra.txt
PLACE = [("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")]  # of such a member's payload; offset 0: there is none
MOST_EXTRAS = 32  # such columns in an index: for the kinds that most samples have
SUFFIX = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}")  # of a member that can have a column


def record_type(key_bytes: int, extras: Sequence[str] = ()) -> np.dtype:
    """The dtype of an index whose longest key has `key_bytes` bytes of UTF-8; `extras` are suffixes with a column."""
    columns = [(EXTRA + suffix, PLACE) for suffix in extras]
    return np.dtype([*FIELDS, *columns, ("key", f"S{max(key_bytes, 1)}")])


def sample_id(key: str) -> int:
    """The first 8 bytes of BLAKE2b of the key, little-endian."""
    return int.from_bytes(hashlib.blake2b(key.encode()).digest()[:8], "little")


def digest_of(ids: np.ndarray) -> int:
    """Order-free checksum of ids: the sum of their hashes modulo 2^64."""
    return int(splitmix64_array(ids).sum(dtype=np.uint64))


def index_name(tar: str) -> str:
    return tar.removesuffix(".tar") + ".index.npy"


def load_records(index: Path) -> np.ndarray:
    """The records of an index file, memory-mapped. Raises InputError when it is missing or no index."""
    try:
        records = np.load(index, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy's parser raises nearly anything on a damaged header
        raise InputError(f"{index} cannot be read ({error}); `penstock shards verify` tells more") from None
    if not is_index(records) or not _is_text(records["key"]):
        raise InputError(f"{index} is not an index; `penstock shards verify` tells more")
    return records


def _is_text(keys: np.ndarray) -> bool:
    try:
        b"\n".join(keys.tolist()).decode()
    except UnicodeDecodeError:
        return False
    return True


def is_index(records: np.ndarray, tar_bytes: int | None = None) -> bool:
    """Whether an array is an index, and, where a tar's length is given, all that it points at lies within."""
    if records.dtype.names is None or records.ndim != 1:
        return False
    *columns, (last, kind) = [(name, records.dtype[name].str) for name in records.dtype.names]
    extras = columns[len(FIELDS) :]
    if columns[: len(FIELDS)] != FIELDS or last != "key" or kind[1] != "S":
        return False
    if not all(name.startswith(EXTRA) and records.dtype[name] == np.dtype(PLACE) for name, _ in extras):
        return False
    places = [records, *(records[name] for name, _ in extras)]
    return tar_bytes is None or all(
        bool(((place["offset"] <= tar_bytes) & (place["size"] <= tar_bytes - place["offset"])).all())
        for place in places
    )


@dataclass
class Sample:
    """The members of one sample, as they gather during the walk."""

    key: str
    fields: dict[str, Member]

    def image(self, extra: Collection[str] = ()) -> tuple[str, Member] | None:
        """The field that holds the image. Raises TarError when there are two, or a dot in its key hides it.

        Args:
            extra: suffixes that are no image of the sample though they look like one, such as mask.png.
        """
        found = [
            (suffix, item)
            for suffix, item in self.fields.items()
            if suffix.rsplit(".", 1)[-1] in EXTENSIONS and suffix not in extra
        ]
        for suffix, item in found:
            if "." in suffix:
                raise TarError(
                    f"{item.name} has a dot within its name, so readers of WebDataset take {self.key!r} for its key "
                    f"and {suffix!r} for its type; rename it without the dot, or, if it is a mask or the like that "
                    f"belongs to {self.key}, add --extra {suffix}",
                    item.header,
                )
        if len(found) > 1:
            names = " and ".join(item.name for _, item in found)
            raise TarError(
                f"sample {self.key} has two images, {names}; keep one, or say which is not the image, as in "
                f"--extra {found[1][0]}",
                found[1][1].header,
            )
        return found[0] if found else None


def walk_samples(data: mmap.mmap | bytes) -> list[Sample]:
    """Samples in order. Raises TarError where webdataset would merge, split, shorten or skip any."""
    from webdataset.tariterators import base_plus_ext

    samples: list[Sample] = []
    seen: set[str] = set()
    for member in members(data):
        if re.match(r"__[^/]*__($|/)", member.name):  # metadata to webdataset, no sample
            continue
        key, suffix = base_plus_ext(member.name)
        if key is None:
            raise TarError(f"{member.name} has no key and extension, so readers would skip it", member.header)
        suffix = suffix.lower()
        if not samples or samples[-1].key != key:
            if key in seen:
                raise TarError(
                    f"{member.name}: other samples lie between the members of sample {key}, or the key is used twice; "
                    "readers would make two samples of it; `tar --sort=name` keeps samples together",
                    member.header,
                )
            seen.add(key)
            samples.append(Sample(key, {}))
        if suffix in samples[-1].fields:
            raise TarError(f"{member.name}: sample {key} has two members of type {suffix}", member.header)
        samples[-1].fields[suffix] = member
    return samples


def label_of(sample: Sample, data: mmap.mmap | bytes) -> int:
    """The label in `cls` or in `json` under "label"; -1 without either. Raises TarError when it is not a number."""
    for suffix in ("cls", "json"):
        member = sample.fields.get(suffix)
        if member is None:
            continue
        text = data[member.offset : member.offset + member.size]
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text[:40]
        if suffix == "json" and isinstance(value, list):  # boxes, say
            continue
        if suffix == "json" and isinstance(value, dict):
            if "label" not in value:
                continue
            value = value["label"]
        if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value < 1 << 31:
            raise TarError(f"{member.name}: the label {value!r} is not a class number (0, 1, ...)", member.header)
        return value
    return -1


@dataclass(frozen=True)
class Indexed:
    """A shard as it goes into the manifest; `unreadable` are keys whose image header could not be read."""

    shard: Shard
    counts: dict[int, int]
    ids: np.ndarray
    unreadable: list[str]

    def matches(self, index: Path) -> bool:
        """Whether the file `index` is this shard's index."""
        return hashlib.sha256(index.read_bytes()).hexdigest() == self.shard.index_sha256


def read_records(
    data: mmap.mmap | bytes, advance: Callable[[int], None] = lambda _: None, extra: Collection[str] = ()
) -> np.ndarray:
    """The records of a tar, made by walking it; `extra` as in `Sample.image`. Raises TarError."""
    rows, others = [], []
    for sample in walk_samples(data):
        found = sample.image(extra)
        if found is None:
            first = next(iter(sample.fields.values()))
            raise TarError(f"sample {sample.key} has no image (jpg, jpeg, png or webp)", first.header)
        member = found[1]
        payload = data[member.offset : member.offset + member.size]
        width, height = image_size(payload)
        label = label_of(sample, data)
        encoded = sample.key.encode()
        rows.append(
            (member.offset, member.size, zlib.crc32(payload), sample_id(sample.key), label, width, height, encoded)
        )
        others.append({s: item for s, item in sample.fields.items() if s not in (found[0], "cls")})
        advance(1)
    return _with_extras(rows, others, data)


def _with_extras(rows: list[tuple], others: list[dict[str, Member]], data: mmap.mmap | bytes) -> np.ndarray:
    """The records of samples with the places of their other members."""
    counts = Counter(suffix for fields in others for suffix in fields if SUFFIX.fullmatch(suffix))
    suffixes = sorted(sorted(counts, key=lambda suffix: (-counts[suffix], suffix))[:MOST_EXTRAS])

    def place(item: Member | None) -> tuple[int, int, int]:
        return (item.offset, item.size, zlib.crc32(data[item.offset : item.offset + item.size])) if item else (0, 0, 0)

    whole = [
        (*row[:-1], *(place(fields.get(suffix)) for suffix in suffixes), row[-1])
        for row, fields in zip(rows, others, strict=True)
    ]
    return np.array(whole, dtype=record_type(max((len(row[-1]) for row in rows), default=1), suffixes))


def index_tar(
    tar: Path,
    name: str,
    index: Path,
    advance: Callable[[int], None] = lambda _: None,
    write: bool = True,
    read: Callable[..., np.ndarray] = read_records,
) -> Indexed:
    """Walk the tar and write its index atomically (or with `write=False` only describe what it would be).

    Args:
        name: the shard's name in the manifest and in messages; `tar` may still have a temporary one.
        index: path of the index.
        read: makes the records, of a tar's bytes.
    """
    if tar.stat().st_size == 0:
        raise InputError(f"{tar} is empty; copy or make it again")
    with tar.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            records = read(data, advance)
        except TarError as error:
            raise InputError(f"{tar.with_name(Path(name).name)}, byte {error.offset:,}: {error.message}") from None
        sha256 = hashlib.sha256(data).hexdigest()
        size = len(data)
    content = npy_bytes(records)
    if write:
        with replacing(index) as target:
            target.write(content)
    labels = records["label"]
    return Indexed(
        shard=Shard(name, size, sha256, len(records), index_name(name), hashlib.sha256(content).hexdigest()),
        counts=dict(Counter(labels[labels >= 0].tolist())),
        ids=records["id"].copy(),
        unreadable=[key.decode() for key in records["key"][records["width"] == 0]],
    )


def npy_bytes(records: np.ndarray) -> bytes:
    """The file that holds `records`; equal records give equal bytes."""
    file = io.BytesIO()
    np.save(file, records, allow_pickle=False)
    return file.getvalue()


def collect(root: Path | Storage, parts: list[Indexed], classes: tuple[str, ...] | None, pack: dict) -> Manifest:
    """The manifest of indexed shards. Raises InputError for keys used twice and labels without a class."""
    storage = LocalStorage(root) if isinstance(root, Path) else root
    counts: Counter[int] = Counter()
    for part in parts:
        counts.update(part.counts)
    if classes is not None and counts and max(counts) >= len(classes):
        raise InputError(
            f"{storage.shown} has the label {max(counts)} but only {len(classes)} class names (labels count from 0); "
            "correct the names or the labels"
        )
    manifest = Manifest(
        shards=tuple(part.shard for part in parts),
        samples=sum(part.shard.samples for part in parts),
        classes=classes,
        class_counts=dict(sorted(counts.items())),
        digest_of_ids=digest_of(np.concatenate([part.ids for part in parts])),
        pack=pack,
        storage=storage,
    )
    _refuse_twins(storage, parts)
    return manifest


def _refuse_twins(storage: Storage, parts: list[Indexed]) -> None:
    ids = np.concatenate([part.ids for part in parts])
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        twin = values[counts > 1][0]
        places = []
        for part in parts:
            if (part.ids == twin).any():
                records = storage.local(part.shard.index, part.shard.index_sha256, load_records)
                places.append(f"{records['key'][records['id'] == twin][0].decode()} in {part.shard.name}")
        raise InputError(
            f"{storage.shown}: {int((counts > 1).sum())} keys name more than one sample, such as {', '.join(places)}; "
            "keys tell samples apart, so they must differ across shards, too"
        )
