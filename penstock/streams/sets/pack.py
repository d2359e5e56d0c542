"""Images into WebDataset shards with manifest and index.

The plan decides which image goes where before anything is written, so the bytes do not depend on the number of
workers, and a pack that was killed goes on with the shards it finished. The manifest comes last: a folder without it
is no set.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from penstock.errors import InputError
from penstock.progress import progress
from penstock.splitmix import permutation
from penstock.streams.decode import DecodeError
from penstock.streams.sets import jobs, timm_info
from penstock.streams.sets.atomic import sync_folder, temporary
from penstock.streams.sets.claim import LOCK, claimed, full_disk_said
from penstock.streams.sets.encoded import storable
from penstock.streams.sets.index import Indexed, collect, index_name, index_tar, load_records, read_records
from penstock.streams.sets.manifest import MANIFEST, PLAN, Manifest
from penstock.streams.sets.remote import upload
from penstock.streams.sets.sources import Item, Source, WithExtras
from penstock.streams.sets.storage import LocalStorage, Storage, open_storage
from penstock.streams.sets.tar import BLOCK, padded

PLAN_VERSION = 1
MEASURED = 32  # images read beforehand, evenly spread, to learn what a sample takes


@dataclass(frozen=True)
class Request:
    """How to pack; equal requests over equal listings give equal bytes."""

    shard_bytes: int = 256 << 20
    shard_samples: int = 10_000
    shuffle_seed: int | None = 0  # None keeps the source's order
    limit: int | None = None


@dataclass(frozen=True)
class Packed:
    """What a pack did, for its last lines on the screen."""

    manifest: Manifest
    kept: int  # shards that an earlier run had finished
    written: int  # images packed by this run
    seconds: float
    skipped: list[str]
    remarks: list[str]


def pack(
    source: Source, address: str, dest: Path | str, request: Request, workers: int, skip_bad: int = 0, show: bool = True
) -> Packed:
    """Pack `source` into the folder `dest`, or to its address.

    Args:
        address: what the source was called on the command line; only recorded.
        skip_bad: how many images that do not open may be left out. They are listed in the manifest.

    Raises:
        InputError: unreadable images, a `dest` that holds something else, a full disk.
    """
    began = time.monotonic()
    storage = open_storage(dest.absolute() if isinstance(dest, Path) else dest)
    items = _ordered(*source.items(), request)
    with _alone(storage):
        plan = _agree_on_plan(storage, source, items, request)
        size = plan["samples_per_shard"]
        numbers = range(-(-len(items) // size))
        cut = [items[number * size : (number + 1) * size] for number in numbers]
        tasks = [(source, storage, number, cut[number], skip_bad > 0) for number in numbers]
        with progress("packing", len(items), show=show) as meter:
            results = jobs.run(_pack_to, tasks, workers, meter, ["webdataset"])
        bad = [line for _, lines, _ in results for line in lines]
        if len(bad) > skip_bad:
            raise InputError(_bad_list(bad, skip_bad))
        parts = [part for part, _, _ in results if part is not None]
        if not parts:
            raise InputError(f"{address}: none of its {len(items)} images opens")
        made = {"source": address, **plan, **_extra(source), "skipped": bad}
        manifest = collect(storage, parts, source.classes, made)
        if manifest.class_counts and not manifest.unlabelled:  # timm takes labelled images alone
            hints = _hints(source, address, str(storage.shown).rpartition("/")[2])
            storage.write(timm_info.NAME, timm_info.timm_info(manifest, hints))
        manifest.save()
        for name in (*(upload.note_name(part.shard.name) for part in parts if storage.fetches), PLAN):
            storage.remove(name)
        kept = [part.shard.samples for part, _, found in results if found and part is not None]
    seconds = time.monotonic() - began
    return Packed(manifest, len(kept), manifest.samples - sum(kept), seconds, bad, source.remarks())


@contextmanager
def _alone(storage: Storage) -> Iterator[None]:
    """A folder for this process alone. In a store two packs of one plan write the same, and another plan is refused."""
    if not isinstance(storage, LocalStorage):
        yield
        return
    with claimed(storage.folder), full_disk_said(storage.folder):
        yield


def _pack_to(
    source: Source, storage: Storage, number: int, items: list[tuple[str, Item]], leave_out: bool, advance: jobs.Advance
) -> tuple[Indexed | None, list[str], bool]:
    """`pack_shard` where the set lies; for a store, in a draft on this machine that is then sent there."""
    if isinstance(storage, LocalStorage):
        return pack_shard(source, storage.folder, number, items, leave_out, advance)
    finished = upload.finished(storage, f"shard-{number:06d}.tar", [key for key, _ in items])
    if finished is not None:
        advance(len(items))
        return finished, [], True
    with tempfile.TemporaryDirectory(prefix="penstock-pack-") as folder:
        indexed, bad, _ = pack_shard(source, Path(folder), number, items, leave_out, advance)
        if indexed is not None:
            upload.send(storage, Path(folder), indexed)
    return indexed, bad, False


def pack_shard(
    source: Source, dest: Path, number: int, items: list[tuple[str, Item]], leave_out: bool, advance: jobs.Advance
) -> tuple[Indexed | None, list[str], bool]:
    """Write one shard and its index, unless an earlier run finished them.

    Returns:
        What went into it (None: nothing was kept, since no image opens, or one does not and none may be left out), the
        images that do not open, and whether it was there already.
    """
    name = f"shard-{number:06d}.tar"
    tar, index = dest / name, dest / index_name(name)
    finished = _finished(tar, index, items, source)
    if finished is not None:
        advance(len(items))
        return finished, [], True
    bad: list[str] = []
    draft = temporary(tar)
    try:
        with full_disk_said(dest):
            _write_tar(draft, source, items, bad, advance)
            if len(bad) == len(items) or (bad and not leave_out):
                return None, bad, False
            indexed = index_tar(draft, name, index, read=_reading(source))
            draft.replace(tar)
        sync_folder(dest)
        return indexed, bad, False
    finally:
        draft.unlink(missing_ok=True)


def _write_tar(
    draft: Path, source: Source, items: list[tuple[str, Item]], bad: list[str], advance: jobs.Advance
) -> None:
    from webdataset import ShardWriter

    handles: list[BinaryIO] = []

    def opened(path: str) -> BinaryIO:
        handles.append(Path(path).open("xb"))  # noqa: SIM115 - closed below
        return handles[-1]

    def closed(_: str) -> None:  # ShardWriter leaves the handle of an opener open (webdataset/writer.py, close)
        handles[-1].flush()
        os.fsync(handles[-1].fileno())
        handles[-1].close()

    pattern = str(draft).replace("%", "%%") + "%.0s"  # ShardWriter formats the number into its pattern
    writer = ShardWriter(
        pattern,
        maxcount=len(items) + 1,
        maxsize=float("inf"),
        encoder=False,
        mtime=0,
        opener=opened,
        post=closed,
        verbose=0,
    )
    try:
        for key, item in items:
            try:
                data, label = source.read(item)
                image, extension = storable(data)
                extra = source.beside(item) if isinstance(source, WithExtras) else {}
                if extension in extra:
                    raise DecodeError(f"is stored as {extension}, and --extra {extension} names another file of it")
            except DecodeError as error:
                bad.append(f"{item.name}: {error}")
            else:
                sample = {"__key__": key, **extra, extension: image}
                writer.write(sample | ({"cls": str(label).encode()} if label >= 0 else {}))
            advance(1)
    finally:
        try:
            writer.close()
        finally:
            handles[-1].close()


def _hints(source: Source, address: str, dest: str) -> str:
    """Words that may tell which split this is."""
    known = vars(source)
    return f"{Path(address).name} {known.get('split')} {Path(str(known.get('root', ''))).name} {dest}"


def _extra(source: Source) -> dict[str, Any]:
    """For the manifest; nothing where there is none."""
    return {"extra": list(source.extra)} if isinstance(source, WithExtras) and source.extra else {}


def _reading(source: Source) -> Callable[..., np.ndarray]:
    return partial(read_records, extra=source.extra if isinstance(source, WithExtras) else ())


def _finished(tar: Path, index: Path, items: list[tuple[str, Item]], source: Source) -> Indexed | None:
    """A shard that an earlier run completed: all its images, and its index agrees with its bytes."""
    if not (tar.is_file() and index.is_file()):
        return None
    try:
        found = index_tar(tar, tar.name, index, write=False, read=_reading(source))
        keys = [key.decode() for key in load_records(index)["key"]]
    except (InputError, OSError):
        return None
    return found if found.matches(index) and keys == [key for key, _ in items] else None


def _ordered(items: list[Item], runs: list[int], request: Request) -> list[tuple[str, Item]]:
    """(key, item) in the order of the shards. Keys number the source's order, so they do not change with the seed."""
    keyed = [(f"{number:08d}-{_slug(item.name)}", item) for number, item in enumerate(items)]
    if request.shuffle_seed is not None:
        starts = np.cumsum([0, *runs])
        order = permutation(len(runs), request.shuffle_seed)
        keyed = [keyed[place] for run in order.tolist() for place in range(starts[run], starts[run + 1])]
    return keyed[: request.limit]


def _slug(name: str) -> str:
    """A name as part of a key: no dot (it would end the key), ASCII, short enough for a plain tar header."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", re.sub(r"\.[A-Za-z0-9]{1,4}$", "", name)).strip("-")[-60:]


def _agree_on_plan(storage: Storage, source: Source, items: list[tuple[str, Item]], request: Request) -> dict[str, Any]:
    """The plan that lies there when it is the same, else a new one. Raises InputError when something else does."""
    listing = hashlib.sha256()
    for key, item in items:
        listing.update(f"{key}\0{item.place!r}\n".encode("utf-8", "surrogatepass"))
    settings = {name: value for name, value in vars(source).items() if isinstance(value, (str, int, bool))}
    wanted = {
        "plan_version": PLAN_VERSION,
        "kind": type(source).__name__,
        "settings": {name: value for name, value in settings.items() if name not in ("root", "path")},
        "classes": list(source.classes) if source.classes else None,
        "images": len(items),
        "listing": listing.hexdigest(),
        **asdict(request),
    }
    dest = storage.shown
    old = _old_plan(storage)
    if old is not None:
        changed = [name for name, value in wanted.items() if old.get(name) != value]
        if changed:
            raise InputError(
                f"{dest} holds a pack made with another plan ({', '.join(changed)} differ); give another DEST, or "
                "delete it first"
            )
        return {name: old[name] for name in (*wanted, "samples_per_shard")}
    others = [name for name in storage.names() if name != LOCK]
    if others:
        raise InputError(f"{dest} is not empty (it holds {sorted(others)[0]}); give a new folder as DEST")
    sample = _sample_bytes(source, items)
    if isinstance(storage, LocalStorage):
        _need_space(storage.folder, int(sample * len(items)))
    most = max(1, min(request.shard_samples, int(request.shard_bytes / sample)))
    shards = -(-len(items) // most)
    plan = wanted | {"samples_per_shard": -(-len(items) // shards)}
    if not storage.create(PLAN, json.dumps(plan).encode()):  # another pack was faster
        return _agree_on_plan(storage, source, items, request)
    return plan


def _old_plan(storage: Storage) -> dict[str, Any] | None:
    made, begun = storage.sizes([MANIFEST, PLAN])
    try:
        if made is not None:
            return dict(Manifest.at(storage).pack)
        return json.loads(storage.content(PLAN)) if begun is not None else None
    except ValueError:
        raise InputError(f"{storage.shown}/{PLAN} is damaged; delete the folder and pack again") from None


def _sample_bytes(source: Source, items: list[tuple[str, Item]]) -> float:
    """Mean bytes a sample takes in a tar, from a few images; a guess when none of them can be read."""
    places = np.unique(np.linspace(0, len(items) - 1, MEASURED).astype(int))
    sizes = []
    for place in places.tolist():
        try:
            data, label = source.read(items[place][1])
            extra = source.beside(items[place][1]) if isinstance(source, WithExtras) else {}
        except DecodeError:
            continue
        beside = sum(BLOCK + padded(len(content)) for content in extra.values())
        sizes.append(BLOCK + padded(len(data)) + (2 * BLOCK if label >= 0 else 0) + beside)
    return sum(sizes) / len(sizes) if sizes else 100_000.0


def _need_space(dest: Path, size: int) -> None:
    free = shutil.disk_usage(dest).free
    if size > free:
        raise InputError(
            f"about {size / 1e9:,.1f} GB are needed, and {dest} has {free / 1e9:,.1f} GB free; free some space, choose "
            "another DEST, or pack fewer images with --limit"
        )


def refuse_nested(source: Path, dest: Path) -> None:
    """Raise InputError when shards would be written among the images they are made of."""
    if dest.resolve().is_relative_to(source.resolve()):
        raise InputError(f"DEST {dest} lies inside SOURCE {source}; give a folder outside of it")


def _bad_list(bad: list[str], allowed: int) -> str:
    shown = "\n  ".join(bad[:50])
    more = f"\n  ... and {len(bad) - 50} more" if len(bad) > 50 else ""
    return (
        f"{len(bad)} images do not open:\n  {shown}{more}\nMend or remove them and run the same command again, or "
        f"leave them out with --skip-bad {len(bad)}" + (f" (it was {allowed})" if allowed else "")
    )
