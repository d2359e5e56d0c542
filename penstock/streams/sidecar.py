"""Answers beside a packed set: for every sample a table with a row for each view of its pool (`data.pool`).

A sidecar is a set of its own: a manifest, and for every shard of the set a tar with the same keys in the same order,
whose members `KEY.answers.npy` are plain arrays, with an index beside. What the rows mean is not known here.
"""

import mmap
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from penstock.errors import InputError
from penstock.streams.reader import ShardReader
from penstock.streams.sets.atomic import sync_folder, temporary, written
from penstock.streams.sets.index import (
    Indexed,
    index_name,
    index_tar,
    load_records,
    npy_bytes,
    record_type,
    sample_id,
    walk_samples,
)
from penstock.streams.sets.manifest import Manifest
from penstock.streams.sets.storage import Fault
from penstock.streams.sets.tar import TarError

MEMBER = "answers.npy"


class Sidecar(Protocol):
    """What a training stream hands over beside the views, as `Batch.extra`.

    Attributes:
        blank: by name, what a slot of weight 0 holds: an answer's shapes and types.
    """

    blank: Mapping[str, np.ndarray]

    def read(self, shard: int, sample: int, key: str, number: int) -> Mapping[str, np.ndarray]:
        """What belongs to a view, by name.

        Args:
            shard, sample: the sample's place in the packed set.
            key: its key there.
            number: of the view in the sample's pool.

        Raises:
            Fault: it cannot be read, or belongs to another sample.
        """
        ...


class PackedSidecar:
    """A folder of answers, read at random (a `Sidecar`).

    Args:
        kind: dtype of a row, whose fields are the names that are handed over.
        views: rows of a sample's table.

    Raises:
        InputError: files are missing or of another size, or it was not made for `data`.
    """

    def __init__(self, manifest: Manifest, data: Manifest, kind: np.dtype, views: int, blank: Mapping[str, np.ndarray]):
        manifest.check_files()
        if [s.samples for s in manifest.shards] != [s.samples for s in data.shards] or (
            manifest.digest_of_ids != data.digest_of_ids
        ):
            raise InputError(f"{manifest.root} holds answers for other samples than those of {data.root}; make it anew")
        self.blank, self.views, self.kind = blank, views, kind
        self._reader = ShardReader(manifest)
        empty = npy_bytes(np.zeros(views, kind))
        self._head, self._bytes = empty[: len(empty) - views * kind.itemsize], len(empty)

    def read(self, shard: int, sample: int, key: str, number: int) -> Mapping[str, np.ndarray]:
        rows = self.rows(shard, sample, key)
        return {name: rows[name][number] for name in self.kind.names or ()}

    def missing(self) -> int:
        """Samples without a table, as the index has it."""
        shards = range(len(self._reader.manifest.shards))
        return sum(int((self._reader.column(shard, "size") != self._bytes).sum()) for shard in shards)

    def rows(self, shard: int, sample: int, key: str) -> np.ndarray:
        """A sample's table, [views] of `kind`. Raises Fault."""
        where = f"its answers in {self._reader.manifest.root}/{self._reader.manifest.shards[shard].name}"
        record = self._reader.record(shard, sample)
        if record.key != key:
            raise Fault(f"{where} are those of another sample, {record.key}", "no_answer")
        try:
            data = self._reader.payload(shard, record)
        except Fault as fault:
            raise Fault(f"{where}: {fault}", "no_answer") from fault
        if not data.startswith(self._head) or len(data) != self._bytes:
            raise Fault(f"{where}: there are none, as its image could not be read when they were made", "no_answer")
        return np.frombuffer(data, self.kind, offset=len(self._head))


def shard_name(number: int) -> str:
    """The tar with the answers for a set's shard."""
    return f"answers-{number:06d}.tar"


def write_shard(folder: Path, number: int, tables: Iterable[tuple[str, np.ndarray]]) -> Indexed:
    """Write the answers for a shard: (key, table) for each of its samples, in its order; complete, or not there.

    A table without rows stands for an image that cannot be read.
    """
    from webdataset import TarWriter

    tar = folder / shard_name(number)
    draft = temporary(tar)
    try:
        with written(draft) as file:
            writer = TarWriter(file, encoder=False, mtime=0)
            for key, table in tables:
                writer.write({"__key__": key, MEMBER: npy_bytes(table)})
            writer.close()
        found = index_tar(draft, tar.name, folder / index_name(tar.name), read=_records)
        draft.replace(tar)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(folder)
    return found


def is_there(folder: Path, number: int) -> bool:
    """Whether a shard's answers were written; the tar comes last."""
    return (folder / shard_name(number)).is_file()


def remove(folder: Path, number: int) -> None:
    """Take away what there is of a shard's answers."""
    (folder / shard_name(number)).unlink(missing_ok=True)


def finished(folder: Path, number: int, keys: list[str]) -> Indexed | None:
    """A shard's answers, if they are whole: for all its samples, and the index agrees with the bytes."""
    tar = folder / shard_name(number)
    index = folder / index_name(tar.name)
    if not (tar.is_file() and index.is_file()):
        return None
    try:
        found = index_tar(tar, tar.name, index, write=False, read=_records)
        written_keys = [key.decode() for key in load_records(index)["key"]]
    except (InputError, OSError):
        return None
    return found if found.matches(index) and written_keys == keys else None


def _records(data: mmap.mmap | bytes, advance: Callable[[int], None] = lambda _: None) -> np.ndarray:
    """The index's records of a tar of answers. Raises TarError."""
    rows = []
    for sample in walk_samples(data):
        member = sample.fields.get(MEMBER)
        if member is None:
            raise TarError(f"sample {sample.key} has no {MEMBER}", next(iter(sample.fields.values())).header)
        crc = zlib.crc32(data[member.offset : member.offset + member.size])
        rows.append((member.offset, member.size, crc, sample_id(sample.key), -1, 0, 0, sample.key.encode()))
    return np.array(rows, dtype=record_type(max((len(row[-1]) for row in rows), default=1)))
