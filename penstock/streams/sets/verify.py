"""Every byte of a set against its checksums, and every image through the decoder."""

import hashlib
import itertools
import mmap
from pathlib import Path

import numpy as np

from penstock.errors import InputError
from penstock.progress import progress
from penstock.streams.decode import DecodeError, decode
from penstock.streams.sets import jobs
from penstock.streams.sets.damage import Damage, locate
from penstock.streams.sets.index import load_records, npy_bytes, read_records
from penstock.streams.sets.manifest import Manifest, Shard
from penstock.streams.sets.storage import Storage
from penstock.streams.sets.tar import TarError

MOST_ROWS = 50


def verify(manifest: Manifest, decode_images: bool = True, workers: int = 1, show: bool = True) -> list[Damage]:
    """All that is wrong with a set; empty when it is whole."""
    tasks = [(manifest.storage, shard, decode_images, manifest.extra) for shard in manifest.shards]
    with progress("verifying", manifest.samples, show=show) as meter:
        found = [damage for part in jobs.run(_verify_one, tasks, workers, meter) for damage in part]
    known = {shard.name for shard in manifest.shards}
    for name in manifest.storage.names() if manifest.storage.lists else ():
        if name.endswith(".tar") and name not in known:
            found.append(Damage(name, "", None, "is not in the manifest"))
    return found


def _verify_one(
    storage: Storage, shard: Shard, decode_images: bool, extra: tuple[str, ...], advance: jobs.Advance
) -> list[Damage]:
    with storage.copies([shard.name, shard.index]) as folder:
        return verify_shard(folder, shard, decode_images, advance, extra)


def verify_shard(
    root: Path, shard: Shard, decode_images: bool, advance: jobs.Advance, extra: tuple[str, ...] = ()
) -> list[Damage]:
    """All that is wrong with a shard and its index."""
    tar = root / shard.name
    if not tar.is_file():
        advance(shard.samples)
        return [Damage(shard.name, "", None, "is missing")]
    if tar.stat().st_size == 0:
        advance(shard.samples)
        return [Damage(shard.name, "", 0, f"is empty; it had {shard.bytes:,} bytes")]
    with tar.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = []
        if len(data) != shard.bytes:
            found.append(Damage(shard.name, "", None, f"has {len(data):,} bytes instead of {shard.bytes:,}"))
        changed = hashlib.sha256(data).hexdigest() != shard.sha256
        records, wrong = _records(root, shard, data, changed, extra)
        found += wrong
        if records is None:
            advance(shard.samples)
            what = "bytes changed; which ones cannot be told without the index"
            return found + ([Damage(shard.name, "", None, what)] if changed else [])
        if changed:
            found += locate(shard, records, data)
        damaged = {damage.sample for damage in found}
        if decode_images:
            found += _undecodable(shard, records, data, damaged, advance)
        else:
            advance(len(records))
    return found


def _records(
    root: Path, shard: Shard, data: mmap.mmap, changed: bool, extra: tuple[str, ...]
) -> tuple[np.ndarray | None, list[Damage]]:
    """The index to trust: the one on disk, or one made anew from an intact tar when that on disk is damaged."""
    path = root / shard.index
    if not path.is_file():
        wrong = "is missing"
    elif hashlib.sha256(path.read_bytes()).hexdigest() != shard.index_sha256:
        wrong = "differs from its checksum"
    else:
        try:
            return load_records(path), []
        except InputError as error:
            wrong = str(error)
    if changed:
        return None, [Damage(shard.index, "", None, wrong)]
    remedy = "; the tar is whole, so `penstock shards index` makes the index again"
    try:
        records = read_records(data, extra=extra)
    except TarError as error:
        return None, [Damage(shard.index, "", None, f"{wrong}; {error.message}")]
    if hashlib.sha256(npy_bytes(records)).hexdigest() != shard.index_sha256:
        remedy = ""
    return records, [Damage(shard.index, "", None, wrong + remedy)]


def _undecodable(
    shard: Shard, records: np.ndarray, data: mmap.mmap, damaged: set[str], advance: jobs.Advance
) -> list[Damage]:
    """Images that were packed as they are and yet do not decode; those known to be damaged are not tried."""
    found = []
    for record in records:
        key, offset, size = record["key"].decode(), int(record["offset"]), int(record["size"])
        if key not in damaged:
            try:
                decode(data[offset : offset + size])
            except DecodeError as error:
                found.append(Damage(shard.name, key, offset, f"does not decode: {error}"))
        advance(1)
    return found


def print_damage(damage: list[Damage]) -> None:
    """A table on standard output, with at most `MOST_ROWS` rows a file."""
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "sample", "byte", "what is wrong", title=f"{len(damage):,} things are wrong")
    for file, found in itertools.groupby(damage, key=lambda each: each.file):
        rows = list(found)
        for each in rows[:MOST_ROWS]:
            table.add_row(file, each.sample, "" if each.byte is None else f"{each.byte:,}", each.what)
        if len(rows) > MOST_ROWS:
            table.add_row(file, "", "", f"and {len(rows) - MOST_ROWS:,} more")
    Console(width=None if Console().is_terminal else 200, markup=False).print(table)
