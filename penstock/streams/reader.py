"""Random access to the samples of a packed set: bytes at an offset, checked."""

import hashlib
import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from penstock.errors import InputError
from penstock.streams.manifest import Manifest

REMEDY = "; copy or pack the set again, or see `penstock shards verify`"
OPEN_SHARDS = 384  # two file descriptors each, below the usual limit of 1024


class Fault(Exception):
    """A sample cannot be read; the message is the reason."""


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
    file: int
    index: np.ndarray


class ShardReader:
    """Reads samples by (shard number, number within the shard). Files open at first use, in the process that reads.

    `os.pread` has no file position, so forked workers cannot disturb each other.
    """

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._checked: set[int] = set()

    def record(self, shard: int, sample: int) -> Record:
        row = self._opened(shard).index[sample]
        return Record(
            row["key"].decode(),
            int(row["id"]),
            int(row["label"]),
            int(row["offset"]),
            int(row["size"]),
            int(row["crc"]),
        )

    def column(self, shard: int, name: str) -> np.ndarray:
        """A field of the index for all samples of a shard, as a copy."""
        return np.array(self._opened(shard).index[name])

    def payload(self, shard: int, record: Record) -> bytes:
        """The image file's bytes.

        Raises:
            Fault: the file is shorter than the index says, or the bytes are not those that were packed.
        """
        try:
            data = os.pread(self._opened(shard).file, record.size, record.offset)
        except OSError as error:
            raise Fault(f"cannot be read: {error}") from error
        if len(data) != record.size:
            raise Fault(f"the shard ends early: {len(data)} of {record.size} bytes")
        if zlib.crc32(data) != record.crc:
            raise Fault("the bytes differ from those that were packed (CRC-32)")
        return data

    def read(self, shard: int, sample: int) -> tuple[bytes, int, str, int]:
        """(bytes, label, key, id) of a sample; raises Fault."""
        record = self.record(shard, sample)
        return self.payload(shard, record), record.label, record.key, record.id

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1].file)

    def _opened(self, shard: int) -> _Open:
        if shard not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1].file)
            self._open[shard] = self._fresh(shard)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _fresh(self, number: int) -> _Open:
        shard = self.manifest.shards[number]
        path = self.manifest.root / shard.index
        try:
            # First the checksum: NumPy's parser raises nearly anything on a damaged header.
            if number not in self._checked:
                if hashlib.sha256(path.read_bytes()).hexdigest() != shard.index_sha256:
                    raise ValueError("it is not the index the manifest describes")
                self._checked.add(number)
            index = np.load(path, mmap_mode="r", allow_pickle=False)
            if len(index) != shard.samples:
                raise ValueError("it is not the index the manifest describes")
            return _Open(os.open(self.manifest.root / shard.name, os.O_RDONLY), index)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{path} or its shard cannot be used: {error}{REMEDY}") from error
