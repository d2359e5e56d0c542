"""The endless training stream of one rank."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from penstock.augment import Augment
from penstock.errors import InputError
from penstock.schedule import Clock, value_at
from penstock.streams.batch import Batch
from penstock.streams.data import Data
from penstock.streams.images import Images
from penstock.streams.loader import Micro, open_loader
from penstock.streams.manifest import Manifest
from penstock.streams.order import Order

WORDS = {
    "manifest": "the training set is another one (or was packed anew)",
    "samples_per_epoch": "the training set has another number of samples",
    "seed": "the seed differs",
    "order_version": "this Penstock orders samples differently",
    "lanes": "data.lanes differs",
    "block": "data.block differs",
    "window": "data.window differs",
}


class TrainStream:
    """Batches as a pure function of the position: the same whatever the ranks, workers and restarts.

    Args:
        batch: samples per optimizer step, over all ranks and micro-batches.
        accumulation: micro-batches per optimizer step.
        size_multiple: sizes that come from a curve are rounded to a multiple of it (the patch size).
    """

    def __init__(
        self,
        data: Data.Config,
        augment: Augment,
        *,
        batch: int,
        accumulation: int,
        rank: int,
        world: int,
        seed: int,
        clock: Clock,
        device_type: str = "cpu",
        size_multiple: int = 1,
    ):
        _check_divisible(batch, accumulation, world)
        self.config, self.augment, self.seed, self.device_type = data, augment, seed, device_type
        self.manifest = Manifest.load(data.train)
        self.images = Images(self.manifest, data.channels, data.cache)
        sizes = [shard.samples for shard in self.manifest.shards]
        self.order = Order(sizes, seed, data.block, data.lanes, data.window)
        self.batch, self.accumulation, self.rank, self.world = batch, accumulation, rank, world
        self.clock, self.size_multiple = clock, size_multiple

    @property
    def samples_per_epoch(self) -> int:
        return self.manifest.samples

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.manifest.classes

    @property
    def identity(self) -> dict[str, Any]:
        """What the position -> sample map depends on; for the checkpoint."""
        known = {"manifest": self.manifest.identity, "samples_per_epoch": self.manifest.samples}
        return known | self.order.identity

    def check_identity(self, saved: Mapping[str, Any]) -> None:
        """Raise InputError when a checkpoint's positions would mean other samples here."""
        differing = [
            f"{WORDS.get(name, name)} ({saved.get(name)} in the checkpoint, {value} now)"
            for name, value in self.identity.items()
            if saved.get(name) != value
        ]
        if differing:
            raise InputError(
                f"this run cannot continue on {self.manifest.root}: {'; '.join(differing)}. "
                "Give the data and seed of the checkpoint, or start a new run from its weights"
            )

    def size_at(self, step: int) -> int:
        """Side of the views of a step, in pixels."""
        size, multiple = value_at(self.augment.config.size, step, self.clock), self.size_multiple
        return max(multiple, round(size / multiple) * multiple) if multiple > 1 else round(size)

    def batches(self, since: int, step: int | None = None) -> Iterator[Batch]:
        """Micro-batches from a sample position on, without end.

        Args:
            since: samples served before, over all ranks.
            step: optimizer steps done before; since / batch unless the batch has changed.
        """
        plan = _TrainPlan(self, since, since // self.batch if step is None else step)
        return open_loader(
            plan, self.images, self.augment, self.seed, self.config.workers, self.config.prefetch, self.device_type
        )


@dataclass(frozen=True)
class _TrainPlan:
    stream: TrainStream
    since: int
    step: int

    def micro(self, number: int) -> Micro:
        stream = self.stream
        steps, part = divmod(number, stream.accumulation)
        begin = self.since + steps * stream.batch + part * (stream.batch // stream.accumulation)
        # Each rank serves every world-th position: an equal share of every micro-batch, and when the world size divides
        # the lanes, always the same lanes of an epoch.
        count = stream.batch // (stream.accumulation * stream.world)
        positions = begin + stream.rank + stream.world * np.arange(count, dtype=np.int64)
        shards, samples = stream.order.locate(positions)
        step = self.step + steps
        return Micro(positions, shards, samples, stream.size_at(step), step)


def _check_divisible(batch: int, accumulation: int, world: int) -> None:
    unit = accumulation * world
    if batch < 1 or batch % unit:
        below, above = batch // unit * unit, (batch // unit + 1) * unit
        nearest = f"{below} or {above}" if below else str(above)
        raise InputError(
            f"a batch of {batch} samples cannot be split evenly over {world} ranks x {accumulation} micro-batches; "
            f"write a multiple of {unit}, such as {nearest}"
        )
