"""A finite, exact stream: every sample once, whatever the number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from penstock.augment import Augment, is_side
from penstock.schedule import Clock, knobs_of, value_at
from penstock.splitmix import key
from penstock.streams.batch import Batch
from penstock.streams.images import Images
from penstock.streams.loader import Micro, open_loader
from penstock.streams.positions.order import permutation
from penstock.streams.stages import After

SUBSET_KEY = 0x5B5E7 << 44


class EvalStream:
    """Iterating gives this rank's batches, of equal number and shape on all ranks; it can be iterated again.

    The last batches are padded with slots of weight 0 and position -1. `positions` are the samples' numbers in the
    set, so that results can be put in one order.

    Args:
        images: the set to read (`Images(manifest, channels)`), which several streams may share.
        batch: samples per rank and batch.
        limit: serve a fixed subset of this many samples, the same for a seed whatever else changes.
        after: what is done with batches (`After.of`), for members beside the image and stages.
        numbers: serve these samples alone, by their numbers in the set, increasing (`Part.chosen`).
        clock: needed when the augmentation's knobs follow curves; their values at the run's end are used.
    """

    def __init__(
        self,
        images: Images,
        augment: Augment,
        *,
        batch: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        prefetch: int = 4,
        limit: int | None = None,
        seed: int = 0,
        device_type: str = "cpu",
        clock: Clock | None = None,
        numbers: np.ndarray | None = None,
        after: After | None = None,
    ):
        self.images, self.augment, self.seed, self.device_type = images, augment, seed, device_type
        self.after = after
        self.batch, self.rank, self.world, self.workers, self.prefetch = batch, rank, world, workers, prefetch
        self.numbers = np.arange(images.manifest.samples, dtype=np.int64) if numbers is None else numbers
        total = len(self.numbers)
        if limit is not None and limit < total:
            self.numbers = self.numbers[np.sort(permutation(total, key(seed, SUBSET_KEY))[:limit])]
        self.first = np.cumsum([0, *(shard.samples for shard in images.manifest.shards)])
        end = clock or Clock(1, 1, 1)
        self.knobs = {name: value_at(knob, end.total, end) for name, knob in knobs_of(augment.config).items()}
        self.knobs |= {name: round(value) for name, value in self.knobs.items() if is_side(name)}

    @property
    def samples(self) -> int:
        """Samples served over all ranks."""
        return len(self.numbers)

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.images.manifest.classes

    def view(self, number: int) -> Tensor | None:
        """One sample by its number in the set, uint8 [C, H, W] as it is served; None where it cannot be read."""
        shard = int(np.searchsorted(self.first, number, side="right")) - 1
        image = self.images.load(shard, number - int(self.first[shard])).image
        return None if image is None else self.augment.view(image, 0, self.knobs)

    def __len__(self) -> int:
        return -(-self.samples // (self.batch * self.world))

    def __iter__(self) -> Iterator[Batch]:
        workers = min(self.workers, len(self))
        return open_loader(
            _EvalPlan(self),
            self.images,
            self.augment,
            self.seed,
            workers,
            self.prefetch,
            self.device_type,
            after=self.after,
        )


@dataclass(frozen=True)
class _EvalPlan:
    stream: EvalStream

    def micro(self, number: int) -> Micro | None:
        stream = self.stream
        if number >= len(stream):
            return None
        first = (number * stream.world + stream.rank) * stream.batch
        served = stream.numbers[first : first + stream.batch]
        shards = np.searchsorted(stream.first, served, side="right") - 1
        padding = np.full(stream.batch - len(served), -1, dtype=np.int64)
        return Micro(
            positions=np.concatenate([served, padding]),
            shards=np.concatenate([shards, padding]),
            samples=np.concatenate([served - stream.first[shards], padding]),
            knobs=stream.knobs,
            step=number,
        )
