"""From planned micro-batches to tensors: reading, augmenting and handing over, in this process or in workers."""

import ctypes
import mmap
import os
import random
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.util import Finalize
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from penstock.augment import Augment, Boxed
from penstock.keyed import seed_sample
from penstock.streams.batch import Batch
from penstock.streams.images import Images, Sample


@dataclass(frozen=True)
class Micro:
    """What one micro-batch of this rank will hold. The arrays are int64 [B]."""

    positions: np.ndarray  # keys the randomness of augmentation
    shards: np.ndarray  # -1 for a slot of padding
    samples: np.ndarray
    knobs: Mapping[str, float]  # the augmentation's at this step; `size` is the side of the square views in pixels
    step: int
    begin: int = 0  # position of the first sample that any rank has in it
    repeats: int = 1  # positions in a row that serve one sample


class Plan(Protocol):
    def micro(self, number: int) -> Micro | None:
        """The micro-batch of this rank after `number` others, or None after the last."""


def assemble(micro: Micro, images: Images, augment: Augment, seed: int) -> Batch:
    """Read and augment one micro-batch. A sample that cannot be read is zeros, with weight 0 and a fault record."""
    samples: list[Sample] = []
    size = int(micro.knobs["size"])
    boxed, row = augment if isinstance(augment, Boxed) else None, None
    slots: list[list[torch.Tensor | None]] = [[] for _ in range(augment.views)]
    faults = []
    with _generators_kept():
        places = zip(micro.positions.tolist(), micro.shards.tolist(), micro.samples.tolist(), strict=True)
        for position, shard, number in places:
            if row != (row := position // micro.repeats):  # repeated augmentation decodes once
                served = range(row * micro.repeats, (row + 1) * micro.repeats)
                factor_of = partial(largest_factor, boxed, micro.knobs, seed, served) if boxed else None
                sample = images.load(shard, number, factor_of) if shard >= 0 else Sample(None, -1, "", 0)
            samples.append(sample)
            if sample.reason:
                name = images.manifest.shards[shard].name
                faults.append({"position": position, "shard": name, "key": sample.key, "reason": sample.reason})
            for view, slot in enumerate(slots):
                if sample.image is None:
                    slot.append(None)
                    continue
                seed_sample(seed, position, view)
                if boxed:
                    slot.append(boxed.view(sample.image, view, micro.knobs, sample.whole))
                else:
                    slot.append(augment.view(sample.image, view, micro.knobs))
    return Batch(
        views=[_stack(slot, (images.channels, size, size)) for slot in slots],
        labels=torch.tensor([sample.label for sample in samples]),
        weights=torch.tensor([float(sample.image is not None) for sample in samples]),
        positions=torch.from_numpy(micro.positions),
        keys=[sample.key for sample in samples],
        step=micro.step,
        begin=micro.begin,
        faults=faults,
        ids=torch.from_numpy(np.array([sample.id for sample in samples], dtype=np.uint64).view(np.int64)),
    )


def largest_factor(
    augment: Boxed, knobs: Mapping[str, float], seed: int, positions: range, height: int, width: int
) -> int:
    """The most an image can be decoded smaller by, 1, 2, 4 or 8, such that no view is enlarged for it.

    Args:
        positions: all that serve this sample in a row, on whichever ranks: the factor, and so the pixels of a view,
            must not depend on which of them are served together.
    """
    size, least = int(knobs["size"]), min(height, width)
    if least < 2 * size:
        return 1  # spares the draws
    for position in positions:
        for view in range(augment.views):
            seed_sample(seed, position, view)
            least = min(least, *augment.box(height, width, view, knobs)[2:])
    return next((factor for factor in (8, 4, 2) if factor * size <= least), 1)


def open_loader(
    plan: Plan, images: Images, augment: Augment, seed: int, workers: int, prefetch: int, device_type: str
) -> Iterator[Batch]:
    """Batches of the plan in order. Micro-batch t is made by worker t % workers, so `in_order` keeps their sequence."""
    leaving = mmap.mmap(-1, 1)  # one byte that forks share
    loader = DataLoader(
        _Planned(plan, images, augment, seed),
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
    return iterator


class _Planned(IterableDataset):
    def __init__(self, plan: Plan, images: Images, augment: Augment, seed: int):
        self.plan, self.images, self.augment, self.seed = plan, images, augment, seed

    def __iter__(self) -> Iterator[Batch]:
        worker: Any = get_worker_info()
        number, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        while (micro := self.plan.micro(number)) is not None:
            yield assemble(micro, self.images, self.augment, self.seed)
            number += stride


def _stack(slot: list[torch.Tensor | None], shape: tuple[int, ...]) -> torch.Tensor:
    """[B, C, H, W]; `shape` is used when there is no readable sample."""
    blank = torch.zeros(next((view.shape for view in slot if view is not None), shape), dtype=torch.uint8)
    return torch.stack([blank if view is None else view for view in slot])


@contextmanager
def _generators_kept() -> Iterator[None]:
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
    for number in (signal.SIGINT, signal.SIGUSR1):  # the rank decides what they mean, and still needs its data
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, when_leaving)
    if sys.platform == "linux":
        die_with_parent = 1  # PR_SET_PDEATHSIG: a killed rank leaves no worker that holds its ports and memory
        ctypes.CDLL(None).prctl(die_with_parent, signal.SIGKILL)
