"""Writes a teacher's answers for every view of a pool: shards in parallel by ranks, and on from where it was."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from finetune.answers import Cache, Identity
from finetune.teachers import Teacher
from penstock import distributed
from penstock.augment import AUGMENTATIONS
from penstock.errors import InputError, RunFailed
from penstock.progress import Meter, progress
from penstock.schedule import knobs_of
from penstock.streams.batch import Batch
from penstock.streams.images import Images
from penstock.streams.loader import Micro, open_loader
from penstock.streams.sets.claim import LOCK, claimed, full_disk_said
from penstock.streams.sets.index import Indexed, collect, load_records
from penstock.streams.sets.manifest import MANIFEST, Manifest, Shard
from penstock.streams.sidecar import finished, is_there, remove, write_shard

WAIT = 0.5  # seconds between looks at whether the other ranks are done
TELL = 60.0  # seconds after which it is said who is awaited; then after twice as long, and so on
FAILED = ".rank-{}.tmp-failed"  # beside the shards, of a rank that could not go on; a draft to who comes next
log = logging.getLogger(__name__)


class Pool:
    """The views of all samples of a recipe's training set, and the teacher that looks at them.

    Args:
        identity: of the answers.
    """

    def __init__(self, recipe: Any, data: Manifest, teacher: Teacher, identity: Identity, device: torch.device):
        self.recipe, self.manifest, self.identity, self.device = recipe, data, identity, device
        self.teacher = teacher.to(device)
        self.images = Images(data, identity.channels, smaller=identity.decode == "smaller")
        self.augment = AUGMENTATIONS.get(recipe.augment.name)(recipe.augment)
        self.knobs = {name: float(knob) for name, knob in knobs_of(recipe.augment).items()}  # rules: no curves
        self.knobs["size"] = round(self.knobs["size"])

    def keys(self, shard: int) -> list[str]:
        """Of a shard's samples, in order."""
        return [key.decode() for key in self.images.reader.column(shard, "key")]

    def answer(self, batch: Batch) -> Tensor:
        """The teacher's logits for a batch's views, fp32 [B, K], on its device."""
        own, mixed = self.teacher, self.recipe.engine.precision == "bf16"
        images = batch.to(self.device).views[0].float() / 255
        images = (images - own.mean[:, None, None]) / own.std[:, None, None]
        with torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext():
            logits = own(images, cast(Any, own)).logits.float()
        if not logits[batch.weights.to(self.device) > 0].isfinite().all():
            raise RunFailed(f"{own.name} gives answers that are not numbers; look for NaN in its weights")
        return logits


class Plan:
    """All views of some shards, in their order. A micro-batch holds whole samples of one shard, so that what is
    computed together, and with it the last bits of every answer, does not depend on who writes which shard."""

    def __init__(self, manifest: Manifest, shards: Sequence[int], views: int, batch: int, knobs: dict[str, float]):
        self.views, self.knobs, rows = views, knobs, max(1, batch // views)
        self.first = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
        sizes = {shard: manifest.shards[shard].samples for shard in shards}
        self.count = {shard: -(-size // rows) for shard, size in sizes.items()}  # micro-batches of a shard
        self.spans = [
            (shard, begin, min(begin + rows, size)) for shard, size in sizes.items() for begin in range(0, size, rows)
        ]

    def micro(self, number: int) -> Micro | None:
        if number >= len(self.spans):
            return None
        shard, begin, end = self.spans[number]
        samples = np.repeat(np.arange(begin, end, dtype=np.int64), self.views)
        return Micro(
            positions=self.first[shard] + samples,
            shards=np.full_like(samples, shard),
            samples=samples,
            knobs=self.knobs,
            step=number,
            pool=np.tile(np.arange(self.views, dtype=np.int64), end - begin),
        )


@dataclass(frozen=True)
class Written:
    """What a command did; `views` and `kept` are over all ranks."""

    cache: Cache
    manifest: Manifest
    views: int  # answered by this command
    kept: int  # shards that were there already
    seconds: float


def write_cache(pool: Pool, cache: Cache, batch: int, show: bool = True) -> Written | None:
    """Write what is missing of a cache. Collective; None on ranks other than the first, which may end then.

    Raises:
        InputError: the folder holds something else or another cache, or is being written to.
        RunFailed: another rank could not go on.
    """
    folder, shards, began = cache.folder, pool.manifest.shards, time.monotonic()
    first = distributed.is_main()
    with claimed(folder) if first else nullcontext(), full_disk_said(folder):
        if first:
            _agree(cache)
        distributed.broadcast(None)  # the others begin when the folder is ours
        with _failure_told(folder):
            mine = range(distributed.rank(), len(shards), distributed.world())
            old = {shard: finished(folder, shard, pool.keys(shard)) for shard in mine}
            todo = [shard for shard, part in old.items() if part is None]
            for shard in todo:
                remove(folder, shard)
            fresh = sorted(shard for others in distributed.collect(todo) for shard in others)
            if first and fresh:
                (folder / MANIFEST).unlink(missing_ok=True)
            new = _write(pool, cache, todo, batch, show and first)
        _wait(folder, len(shards))
        parts = distributed.collect({shard: part.shard for shard, part in (old | new).items() if part})
        if not first:
            return None
        manifest = _finish(cache, {shard: part for others in parts for shard, part in others.items()})
    views = sum(shards[shard].samples for shard in fresh) * cache.identity.pool
    return Written(cache, manifest, views, len(shards) - len(fresh), time.monotonic() - began)


def _write(pool: Pool, cache: Cache, todo: list[int], batch: int, show: bool) -> dict[int, Indexed]:
    plan = Plan(pool.manifest, todo, cache.identity.pool, batch, pool.knobs)
    data, views = pool.recipe.data, sum(pool.manifest.shards[shard].samples for shard in todo) * plan.views
    batches = open_loader(
        plan, pool.images, pool.augment, pool.recipe.seed, data.workers, data.prefetch, pool.device.type
    )
    world = distributed.world()
    with progress(f"rank 0 of {world}, views" if world > 1 else "views", views, show=show) as meter:
        return {
            shard: write_shard(cache.folder, shard, _tables(islice(batches, plan.count[shard]), pool, cache, meter))
            for shard in todo
        }


@contextmanager
def _failure_told(folder: Path) -> Iterator[None]:
    """Where this rank cannot go on, a note for those that would wait for it."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            (folder / FAILED.format(distributed.rank())).touch()
        raise


def _wait(folder: Path, shards: int) -> None:
    """Until all ranks have written theirs. No collective: those time out while a rank has a large shard to write."""
    began, patience = time.monotonic(), TELL
    for shard in range(shards):
        while not is_there(folder, shard):
            failed = [rank for rank in range(distributed.world()) if (folder / FAILED.format(rank)).exists()]
            if failed:
                raise RunFailed(
                    f"rank {failed[0]} could not go on, its own message says why; finished shards are kept in "
                    f"{folder}, the same command goes on"
                )
            if time.monotonic() - began > patience:
                patience *= 2
                _tell(folder, [each for each in range(shard, shards) if not is_there(folder, each)])
            time.sleep(WAIT)


def _tell(folder: Path, awaited: list[int]) -> None:
    some = ", ".join(f"{shard} (rank {shard % distributed.world()})" for shard in awaited[:4])
    more = f" and {len(awaited) - 4} more" if len(awaited) > 4 else ""
    if distributed.is_main():
        log.warning("%s: waiting for other ranks to write the shards %s%s", folder, some, more)


def _agree(cache: Cache) -> None:
    """`cache.json`, which comes first, is the plan that an interrupted command goes on with."""
    old = Cache.read(cache.folder)
    if old is None:
        others = sorted(entry.name for entry in cache.folder.iterdir() if entry.name != LOCK)
        if others:
            raise InputError(f"{cache.folder} is not empty (it holds {others[0]}); give a new folder as --out")
        cache.save()
        return
    remedy = "give another --out, or delete it first"
    old.refuse_other(cache.identity, remedy)
    words = [] if old.top == cache.top else [f"the {old.top} most likely classes instead of {cache.top}"]
    for name in ("precision", "batch"):
        if old.about.get(name) != cache.about.get(name):
            words.append(f"{name} {old.about.get(name)} instead of {cache.about.get(name)}")
    if words:
        raise InputError(f"{cache.folder} holds answers made in another way: {'; '.join(words)}; {remedy}")


def _tables(batches: Iterator[Batch], pool: Pool, cache: Cache, meter: Meter) -> Iterator[tuple[str, np.ndarray]]:
    """(key, rows of its views) of each sample; without rows where its image cannot be read."""
    views, layout = cache.identity.pool, cache.layout
    for batch in batches:
        rows = layout.pack(pool.answer(batch))
        for begin in range(0, len(batch), views):
            good = bool(batch.weights[begin : begin + views].all())
            yield batch.keys[begin], rows[begin : begin + (views if good else 0)]
        meter.advance(len(batch))


def _finish(cache: Cache, shards: dict[int, Shard]) -> Manifest:
    """The manifest of shards that the ranks which wrote or found them have read through."""
    parts = [
        Indexed(shard, counts={}, ids=np.array(load_records(cache.folder / shard.index)["id"]), unreadable=[])
        for _, shard in sorted(shards.items())
    ]
    manifest = collect(cache.folder, parts, None, {"cache": cache.sum})
    manifest.save(cache.folder)
    return manifest
