"""Random access to the samples of a packed set: bytes at an offset, checked."""

import errno
import hashlib
import resource
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from penstock.errors import InputError
from penstock.streams.sets.index import EXTRA, is_index
from penstock.streams.sets.manifest import Manifest, Shard
from penstock.streams.sets.storage import Fault, File
from penstock.streams.timing import BYTES

REMEDY = "; copy or pack the set again, or see `penstock shards verify`"
BLOCK = 256  # as many samples as stay together in an epoch's order (data.block)
MOST_FETCHED = 64 << 20  # bytes that are fetched at once, if they are not of one sample
AHEAD = 32  # indices that are fetched together by who reads them all
OPEN_SHARDS = 384  # of all readers of a process, two file descriptors each: below the usual limit of 1024


@dataclass(frozen=True, slots=True)
class Record:
    """What the index knows of a sample without reading it."""

    key: str
    id: int
    label: int  # -1 where there is none
    offset: int
    size: int
    crc: int


@dataclass(frozen=True, slots=True)
class _Open:
    file: File
    index: np.ndarray
    begins: np.ndarray | None  # of the runs of bytes that are fetched at once, and the end of the last

    def around(self, offset: int) -> tuple[int, int] | None:
        """The run of bytes that a place is fetched with; None for local files."""
        if self.begins is None:
            return None
        number = min(int(np.searchsorted(self.begins, offset, side="right")), len(self.begins) - 1)
        return int(self.begins[number - 1]), int(self.begins[number])


class ShardReader:
    """Reads samples by (shard number, number within the shard). Files open at first use, in the process that reads.

    `os.pread` has no file position, so forked workers cannot disturb each other. Files close with the reader.
    """

    _all: ClassVar["weakref.WeakSet[ShardReader]"] = weakref.WeakSet()

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self._open: OrderedDict[int, _Open] = OrderedDict()  # the longest unused first
        self._checked: set[int] = set()
        self.block = BLOCK  # samples that are fetched together from an object store
        self._bytes = 0.0
        self._all.add(self)
        weakref.finalize(self, _close, self._open)

    @property
    def counters(self) -> dict[str, float]:
        """Running counts (`penstock.streams.timing`)."""
        return {BYTES: self._bytes} | self.manifest.storage.counters

    def record(self, shard: int, sample: int) -> Record:
        row = self._opened(shard).index[sample]
        return Record(
            row["key"].decode(errors="replace"),
            int(row["id"]),
            int(row["label"]),
            int(row["offset"]),
            int(row["size"]),
            int(row["crc"]),
        )

    def row(self, shard: int, sample: int) -> np.void:
        """All that the index knows of a sample (`penstock.streams.sets.index`)."""
        return self._opened(shard).index[sample]

    def names(self, shard: int) -> tuple[str, ...]:
        """The columns of a shard's index."""
        return self._opened(shard).index.dtype.names or ()

    def column(self, shard: int, name: str) -> np.ndarray:
        """A field of the index for all samples of a shard, as a copy."""
        if shard not in self._open:  # usually the next ones follow
            self._prepare_indices(range(shard, min(shard + AHEAD, len(self.manifest.shards))))
        return np.array(self._opened(shard).index[name])

    def payload(self, shard: int, record: Record) -> bytes:
        """The image file's bytes.

        Raises:
            Fault: the file is shorter than the index says, or the bytes are not those that were packed.
        """
        opened = self._opened(shard)
        around = opened.around(record.offset)
        try:
            data = opened.file.read(record.offset, record.size, around)
            intact = zlib.crc32(data) == record.crc
            if not intact and opened.file.drop(record.offset, record.size, around):
                data = opened.file.read(record.offset, record.size, around)
                intact = zlib.crc32(data) == record.crc
        except OSError as error:
            raise Fault(f"cannot be read: {error}") from error
        self._bytes += len(data)
        if len(data) != record.size:
            raise Fault(f"the shard ends early: {len(data)} of {record.size} bytes", "short")
        if not intact:
            raise Fault("the bytes differ from those that were packed (CRC-32)", "changed")
        return data

    def read(self, shard: int, sample: int) -> tuple[bytes, int, str, int]:
        """(bytes, label, key, id) of a sample; raises Fault."""
        record = self.record(shard, sample)
        return self.payload(shard, record), record.label, record.key, record.id

    def fetch_by(self, block: int) -> None:
        """Fetch as many neighbouring samples together as stay together in the order (`data.block`)."""
        self.block = block

    def prepare(self, places: Iterable[tuple[int, int]]) -> None:
        """Begin to fetch (shard, sample)s that will be read soon; nothing to do for local files."""
        if not self.manifest.storage.fetches:
            return
        wanted = [place for place in places if place[0] >= 0]
        self._prepare_indices({shard for shard, _ in wanted})
        requests: dict[tuple[int, int], Any] = {}
        for shard, sample in wanted:
            opened = self._opened(shard)
            offset, size = int(opened.index["offset"][sample]), int(opened.index["size"][sample])
            around = opened.around(offset)
            if around is not None and (shard, around[0]) not in requests:
                requests[shard, around[0]] = opened.file.request(offset, size, around)
        self.manifest.storage.ahead([request for request in requests.values() if request is not None])

    def _prepare_indices(self, shards: Iterable[int]) -> None:
        """Begin to fetch the indices of shards that are not open."""
        storage = self.manifest.storage
        if storage.fetches:
            closed = [self.manifest.shards[number] for number in shards if number not in self._open]
            storage.ahead([storage.whole_request(shard.index, shard.index_sha256) for shard in closed])

    def close(self) -> None:
        _close(self._open)

    def _opened(self, shard: int) -> _Open:
        if shard not in self._open:
            self._make_room()
            self._open[shard] = self._fresh(shard)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _make_room(self) -> None:
        """Close shards of the readers that have most, so that one more may open."""
        room = _most_open()
        while sum(len(reader._open) for reader in self._all) >= room:
            fullest = max(self._all, key=lambda reader: len(reader._open))
            _close(fullest._open, 1)

    def _fresh(self, number: int) -> _Open:
        shard = self.manifest.shards[number]
        storage, path = self.manifest.storage, f"{self.manifest.root}/{shard.index}"
        try:
            index = storage.local(shard.index, shard.index_sha256, partial(self._index, number))
            begins = _begins(index, shard, self.block) if storage.fetches else None
            return _Open(storage.open(shard.name, shard.bytes, shard.sha256), index, begins)
        except InputError:
            raise
        except Exception as error:  # NumPy's parser raises nearly anything on a damaged header
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise InputError(
                    f"{path}: too many files are open at once ({error.strerror}); raise the limit in the shell that "
                    "starts this command, with `ulimit -n 4096`, or ask who runs the machine to"
                ) from error
            raise InputError(f"{path} or its shard cannot be used: {error}{REMEDY}") from error

    def _index(self, number: int, local: Path) -> np.ndarray:
        """The index in a file; its checksum is computed once."""
        shard = self.manifest.shards[number]
        if number not in self._checked:
            if hashlib.sha256(local.read_bytes()).hexdigest() != shard.index_sha256:
                raise ValueError("it is not the index the manifest describes")
            self._checked.add(number)
        index = np.load(local, mmap_mode="r", allow_pickle=False)
        if not is_index(index, shard.bytes) or len(index) != shard.samples:
            raise ValueError("it is not the index the manifest describes")
        return index


def _begins(index: np.ndarray, shard: Shard, block: int) -> np.ndarray:
    """Where each block of `block` samples begins, and the end of the last; halved while their bytes are too many."""
    while block > 1 and block * shard.bytes > MOST_FETCHED * max(1, shard.samples):
        block //= 2
    first = index[::block]
    begins = first["offset"].astype(np.int64)
    for name in (name for name in first.dtype.names or () if name.startswith(EXTRA)):
        offsets = first[name]["offset"].astype(np.int64)  # a sample's members lie on both sides of its image
        begins = np.where(offsets > 0, np.minimum(begins, offsets), begins)
    begins[:1] = 0
    return np.append(begins, shard.bytes)


def _close(shards: OrderedDict[int, _Open], count: int | None = None) -> None:
    """Close those that were not used for longest; all without a count."""
    for _ in range(len(shards) if count is None else count):
        shards.popitem(last=False)[1].file.close()


def _most_open() -> int:
    """Shards that may be open in this process: three quarters of its descriptors, at two each."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return OPEN_SHARDS if limit == resource.RLIM_INFINITY else max(1, min(OPEN_SHARDS, limit * 3 // 8))
