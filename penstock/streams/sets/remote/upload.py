"""Shards on their way into an object store, one by one, so that a pack goes on where it was stopped.

A note beside each shard says that it is there whole, with what the manifest needs of it. The notes leave when the
manifest comes.
"""

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np

from penstock.errors import InputError
from penstock.streams.sets.index import Indexed, index_name, load_records
from penstock.streams.sets.manifest import MANIFEST, Manifest, Shard
from penstock.streams.sets.storage import Fault, Storage


def note_name(shard: str) -> str:
    return f".{shard}.packed.json"


def send(storage: Storage, folder: Path, indexed: Indexed) -> None:
    """Store a shard and its index from a folder, then its note. Raises InputError if they do not arrive whole."""
    shard = indexed.shard
    sizes = [(folder / name).stat().st_size for name in (shard.index, shard.name)]
    for name in (shard.index, shard.name):
        storage.write(name, folder / name)
    if storage.sizes([shard.index, shard.name]) != sizes:
        raise InputError(f"{storage.shown}/{shard.name} did not arrive whole; run the same command again")
    storage.write(note_name(shard.name), json.dumps(asdict(shard)).encode())


def finished(storage: Storage, name: str, keys: list[str]) -> Indexed | None:
    """A shard that an earlier run stored with all its images, as its note has it, or a manifest."""
    try:
        shard = _noted(storage, name)
        if shard.name != name or storage.sizes([name]) != [shard.bytes]:
            return None
        with storage.copies([shard.index]) as folder:
            if hashlib.sha256((folder / shard.index).read_bytes()).hexdigest() != shard.index_sha256:
                return None
            records = np.array(load_records(folder / shard.index))
    except (OSError, ValueError, TypeError, KeyError, Fault):
        return None
    if [key.decode() for key in records["key"]] != keys:
        return None
    labels = records["label"]
    unreadable = [key.decode() for key in records["key"][records["width"] == 0]]
    return Indexed(shard, dict(Counter(labels[labels >= 0].tolist())), records["id"], unreadable)


def _noted(storage: Storage, name: str) -> Shard:
    try:
        shard = Shard(**json.loads(storage.content(note_name(name))))
        if shard.index != index_name(name):
            raise ValueError(f"the note of {name} has the index {shard.index!r}")
        return shard
    except FileNotFoundError:
        if storage.sizes([MANIFEST]) == [None]:
            raise
        return {shard.name: shard for shard in Manifest.at(storage).shards}[name]
