"""From planned micro-batches to tensors: reading, augmenting and handing over, in this process or in workers."""

import ctypes
import gc
import mmap
import os
import random
import signal
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.util import Finalize
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from penstock.augment import Augment, Boxed, side_of
from penstock.keyed import seed_sample
from penstock.streams.batch import Batch
from penstock.streams.decode import ALL, Need
from penstock.streams.handover import room_for
from penstock.streams.images import Images, Sample
from penstock.streams.sets.storage import Fault
from penstock.streams.sidecar import Sidecar
from penstock.streams.stages import After
from penstock.streams.timing import AUGMENT, SAMPLES, since

POOL = 0x9001 << 44  # keys of a fixed pool's views begin with it, which no position does
FEW_VIEWS = 2  # more of them reach nearly all rows together
AHEAD = 2  # micro-batches of a worker whose images are asked for beforehand, from a store beyond this machine
TRIALS = 8  # views that are made to see what an augmentation imports; parts of one come with a probability
Key = tuple[int, ...]  # of a served sample's random numbers; a view's number follows it


@dataclass(frozen=True)
class Micro:
    """What one micro-batch of this rank will hold. The arrays are int64 [B]."""

    positions: np.ndarray  # keys the randomness of augmentation, unless there is a pool
    shards: np.ndarray  # -1 for a slot of padding
    samples: np.ndarray
    knobs: Mapping[str, float]  # the augmentation's at this step; `size` is the side of the square views in pixels
    step: int
    begin: int = 0  # position of the first sample that any rank has in it
    repeats: int = 1  # positions in a row that serve one sample
    pool: np.ndarray | None = None  # which of each sample's fixed pool of views; keys them with the sample's id


class Plan(Protocol):
    def micro(self, number: int) -> Micro | None:
        """The micro-batch of this rank after `number` others, or None after the last."""


def assemble(micro: Micro, images: Images, augment: Augment, seed: int, sidecar: Sidecar | None = None) -> Batch:
    """Read and augment one micro-batch. A sample that cannot be read is zeros, with weight 0 and a fault record.

    So is one for whose view the sidecar has nothing.
    """
    decoded, before, augmenting = _Decoded(micro, images, augment, seed), images.counters, 0.0
    samples: list[Sample] = []
    beside: list[Mapping[str, np.ndarray]] = []
    sides = [side_of(augment, view, micro.knobs) for view in range(augment.views)]
    views = room_for([(len(micro.positions), images.channels, side, side) for side in sides])
    weights, faults = [], []
    with generators_kept():
        for slot, (position, shard) in enumerate(zip(micro.positions.tolist(), micro.shards.tolist(), strict=True)):
            sample, key = decoded.sample(slot)
            if sidecar is not None:
                sample, held = _beside(sidecar, micro, slot, sample)
                beside.append(held)
            if sample.reason:
                name = images.manifest.shards[shard].name
                fault = {"position": position, "shard": name, "key": sample.key}
                faults.append(fault | {"kind": sample.kind, "reason": sample.reason})
            began = perf_counter()
            for number, slots in enumerate(views):
                if sample.image is None:
                    slots[slot] = 0
                    continue
                seed_sample(*key, number)
                if decoded.boxed:
                    slots[slot] = decoded.boxed.view(sample.image, number, micro.knobs, sample.whole)
                else:
                    slots[slot] = augment.view(sample.image, number, micro.knobs)
            augmenting += perf_counter() - began
            weights.append(float(sample.image is not None))
            samples.append(replace(sample, image=None))  # its memory holds the next image, and needs no fresh pages
    return Batch(
        views=views,
        labels=torch.tensor([sample.label for sample in samples]),
        weights=torch.tensor(weights),
        positions=torch.from_numpy(micro.positions),
        keys=[sample.key for sample in samples],
        step=micro.step,
        begin=micro.begin,
        faults=faults,
        ids=torch.from_numpy(np.array([sample.id for sample in samples], dtype=np.uint64).view(np.int64)),
        extra={name: _joined([held[name] for held in beside]) for name in (sidecar.blank if sidecar else ())},
        timing=since(before, images.counters) | {SAMPLES: float(len(samples)), AUGMENT: augmenting},
    )


class _Decoded:
    """The samples of a micro-batch in turn. Those served in a row share a decode where they need the same pixels."""

    def __init__(self, micro: Micro, images: Images, augment: Augment, seed: int):
        self.micro, self.images, self.seed = micro, images, seed
        self.boxed = augment if isinstance(augment, Boxed) else None
        self._last: tuple[tuple[int, int], tuple[Key, ...]] | None = None  # place and keys of the last decode
        self._sample: Sample
        self._asked: tuple[int, int, Need] | None = None  # height, width and need, where the last decode asked for it

    def sample(self, slot: int) -> tuple[Sample, Key]:
        """The sample of a slot, and the key of its random numbers."""
        place = int(self.micro.shards[slot]), int(self.micro.samples[slot])
        if place[0] < 0:
            return Sample(None, -1, "", 0), ()
        key, sharing = self._keys(slot, place)
        if not self._fits(place, sharing):
            self._asked = None
            need_of = partial(self._need, sharing) if self.boxed else None
            self._last, self._sample = (place, sharing), self.images.load(*place, need_of)
        return self._sample, key

    def _keys(self, slot: int, place: tuple[int, int]) -> tuple[Key, tuple[Key, ...]]:
        """The slot's key, and those of all servings that must be decoded alike.

        The pixels of a view must not depend on which others are served together, on this rank or at all. Repeats of
        one sample are therefore decoded for the most demanding of them. Views of a pool are decoded each for itself:
        whoever makes or reads a pool has its views in other company.
        """
        position, repeats = int(self.micro.positions[slot]), self.micro.repeats
        if self.micro.pool is not None:
            key: Key = (POOL, self.images.reader.record(*place).id, int(self.micro.pool[slot]))
            return key, (key,)
        row = position // repeats
        return (self.seed, position), tuple((self.seed, row * repeats + again) for again in range(repeats))

    def _need(self, keys: tuple[Key, ...], height: int, width: int) -> Need:
        assert self.boxed is not None
        need = need_of_views(self.boxed, self.micro.knobs, keys, height, width)
        self._asked = height, width, need
        return need

    def _fits(self, place: tuple[int, int], sharing: tuple[Key, ...]) -> bool:
        """Whether the last sample is this one, decoded to the pixels that these servings need."""
        if self._last is None or place != self._last[0]:
            return False
        if self.micro.pool is None or sharing == self._last[1]:
            return sharing == self._last[1]
        if self._asked is None or self.boxed is None:  # it is decoded whole, whoever it is for
            return True
        height, width, (factor, rows) = self._asked
        need = need_of_views(self.boxed, self.micro.knobs, sharing, height, width)
        return need.factor == factor and (rows or height) >= (need.rows or height)


def need_of_views(augment: Boxed, knobs: Mapping[str, float], keys: Sequence[Key], height: int, width: int) -> Need:
    """How much smaller an image can be decoded such that no view is enlarged for it, and the rows that views reach.

    Args:
        keys: of the random numbers of all servings that are decoded alike.
    """
    sides = [side_of(augment, view, knobs) for view in range(augment.views)]
    least = min(height, width)
    if least < 2 * max(sides) and len(keys) * len(sides) > FEW_VIEWS:
        return ALL  # spares the draws
    room, rows = [least] * len(sides), 0  # the least side of a box, per view; where the lowest box ends
    for key in keys:
        for view in range(len(sides)):
            seed_sample(*key, view)
            top, _, tall, wide = augment.box(height, width, view, knobs)
            room[view], rows = min(room[view], tall, wide), max(rows, top + tall)
    fits = (factor for factor in (8, 4, 2) if all(factor * side <= r for side, r in zip(sides, room, strict=True)))
    return Need(next(fits, 1), rows)


def _beside(sidecar: Sidecar, micro: Micro, slot: int, sample: Sample) -> tuple[Sample, Mapping[str, np.ndarray]]:
    """A sample with what its view has in the sidecar; without an image where there is nothing."""
    if sample.image is None:
        return sample, sidecar.blank
    assert micro.pool is not None
    try:
        place = int(micro.shards[slot]), int(micro.samples[slot])
        return sample, sidecar.read(*place, sample.key, int(micro.pool[slot]))
    except Fault as fault:
        return replace(sample, image=None, reason=str(fault), kind=fault.kind), sidecar.blank


def _joined(held: list[np.ndarray]) -> torch.Tensor:
    """[B, ...]; unsigned integers as int64, since torch computes with few of them."""
    values = np.stack(held)
    return torch.from_numpy(values.astype(np.int64) if values.dtype.kind == "u" else values)


def open_loader(
    plan: Plan,
    images: Images,
    augment: Augment,
    seed: int,
    workers: int,
    prefetch: int,
    device_type: str,
    sidecar: Sidecar | None = None,
    after: After | None = None,
) -> Iterator[Batch]:
    """Batches of the plan in order. Micro-batch t is made by worker t % workers, so `in_order` keeps their sequence."""
    leaving = mmap.mmap(-1, 1)  # one byte that forks share
    if workers:
        _try_out(augment, plan.micro(0), images.channels)
    loader = DataLoader(
        _Planned(plan, images, augment, seed, sidecar, after),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        in_order=True,
        pin_memory=device_type == "cuda",
        worker_init_fn=partial(_start_worker, leaving) if workers else None,
        # A fork starts in milliseconds and shares the index and the cache; workers never touch CUDA.
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # else the loader would draw from the training's generator
    )
    iterator = iter(loader)
    # A process that ends stops its children with SIGTERM and waits for them; before that, let them obey it.
    Finalize(iterator, leaving.__setitem__, args=(0, 1), exitpriority=100)
    return _served(iterator) if workers else iterator


def _served(iterator: Iterator[Batch]) -> Iterator[Batch]:
    """An error of a worker without the frames here: torch's hold it, and so the iterator until a garbage collection.

    That would end the queues before the iterator stops its workers by them, which takes 5 s (MP_STATUS_CHECK_INTERVAL).
    """
    try:
        yield from iterator
    except Exception as error:
        raise error.with_traceback(None) from None


def _try_out(augment: Augment, micro: Micro | None, channels: int) -> None:
    """Make some views here: what augmentations import late is then loaded once, before the fork, and shared."""
    blank = np.zeros((64, 64, channels), dtype=np.uint8)
    with generators_kept():
        for number in range(TRIALS if micro is not None else 0):
            for view in range(augment.views):
                seed_sample(number, view)
                augment.view(blank, view, micro.knobs)  # type: ignore[union-attr]


class _Planned(IterableDataset):
    def __init__(
        self,
        plan: Plan,
        images: Images,
        augment: Augment,
        seed: int,
        sidecar: Sidecar | None,
        after: After | None,
    ):
        self.plan, self.images, self.augment, self.seed = plan, images, augment, seed
        self.sidecar, self.after = sidecar, after

    def __iter__(self) -> Iterator[Batch]:
        worker: Any = get_worker_info()
        number, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for micro in _prepared(self.plan, number, stride, self.images):
            batch = assemble(micro, self.images, self.augment, self.seed, self.sidecar)
            yield batch if self.after is None else self.after(batch, micro)


def _prepared(plan: Plan, number: int, stride: int, images: Images) -> Iterator[Micro]:
    """Every stride-th micro-batch from a number on; what is fetched for one is asked for while others are made."""
    waiting: deque[Micro] = deque()
    while (micro := plan.micro(number)) is not None:
        images.reader.prepare(zip(micro.shards.tolist(), micro.samples.tolist(), strict=True))
        waiting.append(micro)
        number += stride
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting


@contextmanager
def generators_kept() -> Iterator[None]:
    """Augmentation seeds the global generators; the training's own draws must not notice."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _start_worker(leaving: mmap.mmap, _: int) -> None:
    def when_leaving(*_: Any) -> None:
        if leaving[0]:
            os._exit(0)

    torch.set_num_threads(1)
    gc.freeze()  # a collection would write to what is shared with the rank, and so copy it
    for number in (signal.SIGINT, signal.SIGUSR1):  # the rank decides what they mean, and still needs its data
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, when_leaving)
    if sys.platform == "linux":
        die_with_parent = 1  # PR_SET_PDEATHSIG: a killed rank leaves no worker that holds its ports and memory
        ctypes.CDLL(None).prctl(die_with_parent, signal.SIGKILL)
