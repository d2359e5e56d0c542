"""The endless training stream of one rank."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from penstock.augment import Augment, is_side
from penstock.errors import InputError
from penstock.schedule import Clock, knobs_of, value_at
from penstock.streams.batch import Batch
from penstock.streams.data import Data
from penstock.streams.extras import check_present
from penstock.streams.images import Images
from penstock.streams.loader import Micro, open_loader
from penstock.streams.positions.identity import differences
from penstock.streams.positions.mixture import open_part, open_sets
from penstock.streams.positions.mixture_order import Course
from penstock.streams.sidecar import Sidecar
from penstock.streams.stages import After, Stage

QUARTERS = 4


class TrainStream:
    """Batches as a pure function of the position: the same whatever the ranks, workers and restarts.

    Args:
        batch: samples per optimizer step, over all ranks and micro-batches.
        accumulation: micro-batches per optimizer step.
        size_multiple: sizes that come from a curve are rounded to a multiple of it (the patch size).
        growth: while views are smaller than at the run's end, a step takes up to this many times the batch, so that
            its number of pixels stays about the same; in quarters of the batch, and the run ends on the same sample.
        sidecar: hands over what it holds of each view of the fixed pool (`data.pool`), as `Batch.extra`.
        stages: run on every sample after augmentation and those of the recipe (penstock/streams/stages.py).
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
        growth: float = 1.0,
        sidecar: Sidecar | None = None,
        stages: Sequence[Stage] = (),
    ):
        assert sidecar is None or data.pool is not None, "views that never come again have nothing beside them"
        _check_divisible(batch, accumulation, world, growth)
        self.config, self.augment, self.seed, self.device_type = data, augment, seed, device_type
        self.manifest = open_sets(data.train, remote=data.remote)
        self.images = Images(self.manifest, data.channels, data.cache, data.decode == "smaller")
        self.images.reader.fetch_by(data.block)
        self.part = open_part(self.images.reader, data.labels, seed, data.repeats)
        cut = {"block": data.block, "lanes": data.lanes, "window": data.window}
        self.course = Course.of(self.manifest, self.part, seed, cut, clock)
        self.batch, self.accumulation, self.rank, self.world = batch, accumulation, rank, world
        self.clock, self.size_multiple, self.growth, self.sidecar = clock, size_multiple, growth, sidecar
        if sidecar is not None and self.course.shares is not None:
            raise InputError("data.train: a teacher's stored answers are for one set, and this is a mixture")
        check_present(self.images.reader, data.extra)
        self.after = After.of(self.images, augment, data.extra, [*data.stages, *stages], seed)
        if sidecar is not None and (data.stages or stages):
            raise InputError("data.stages: a teacher's stored answers are for views that no stage changed; remove them")

    @property
    def samples_per_epoch(self) -> int:
        return self.part.samples

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.manifest.classes

    @property
    def identity(self) -> dict[str, Any]:
        """What the position -> sample map depends on; for the checkpoint."""
        return self.course.identity

    def check_identity(self, saved: Mapping[str, Any]) -> None:
        """Raise InputError when a checkpoint's positions would mean other samples here."""
        differing = list(differences(saved, self.identity))
        if differing:
            raise InputError(
                f"this run cannot continue on {self.manifest.root}: {'; '.join(differing)}. "
                "Give the data and seed of the checkpoint, or start a new run from its weights"
            )

    def knobs_at(self, position: int) -> dict[str, float]:
        """The augmentation's knobs for the step that begins at a sample position."""
        time = position / self.batch
        return {
            name: side_at(knob, time, self.clock, self.size_multiple)
            if is_side(name)
            else value_at(knob, time, self.clock)
            for name, knob in knobs_of(self.augment.config).items()
        }

    def batch_at(self, position: int) -> int:
        """Samples of the step that begins at a sample position."""
        if self.growth == 1:
            return self.batch
        last = self.knobs_at(self.clock.samples)["size"]
        room = min(max((last / self.knobs_at(position)["size"]) ** 2, 1.0), self.growth)
        grown = int(room * QUARTERS + 1e-9) * self.batch // QUARTERS
        left = self.clock.samples - position
        return min(grown, left) if left > 0 else self.batch

    def batches(self, since: int, step: int | None = None) -> Iterator[Batch]:
        """Micro-batches from a sample position on, without end.

        Args:
            since: samples served before, over all ranks.
            step: optimizer steps done before; since / batch unless the batch has changed.
        """
        plan = _TrainPlan(self, since, since // self.batch if step is None else step)
        plan.micro(0)  # computes the epoch's order once, and workers share it
        return open_loader(
            plan,
            self.images,
            self.augment,
            self.seed,
            self.config.workers,
            self.config.prefetch,
            self.device_type,
            self.sidecar,
            self.after,
        )

    def micro_at(self, begin: int, step: int, part: int) -> Micro:
        """This rank's micro-batch number `part` of the step that begins at a sample position."""
        batch, knobs = self.batch_at(begin), self.knobs_at(begin)
        begin += part * (batch // self.accumulation)
        positions = begin + np.arange(batch // self.accumulation, dtype=np.int64)
        return self.micro(self.course.of_rank(positions, self.rank, self.world), knobs, step, begin)

    def micro(self, positions: np.ndarray, knobs: Mapping[str, float], step: int = 0, begin: int = 0) -> Micro:
        """The micro-batch of the samples at some positions."""
        rows, again = np.divmod(positions, self.part.repeats)
        shards, samples, epochs = self.course.locate(rows)
        pool = None
        if self.config.pool is not None:  # a sample's first serving has number 0, its next one number 1, ...
            pool = (epochs * self.part.repeats + again) % self.config.pool
        return Micro(positions, shards, samples, knobs, step, begin, self.part.repeats, pool)


class _TrainPlan:
    """The micro-batches in turn; `micro` is asked for increasing numbers."""

    def __init__(self, stream: TrainStream, since: int, step: int):
        self.stream, self.first = stream, step
        self._done, self._begin = 0, since  # steps passed, and the position they led to

    def micro(self, number: int) -> Micro:
        stream = self.stream
        steps, part = divmod(number, stream.accumulation)
        while self._done < steps:
            self._begin += stream.batch_at(self._begin)
            self._done += 1
        return stream.micro_at(self._begin, self.first + steps, part)


def _check_divisible(batch: int, accumulation: int, world: int, growth: float) -> None:
    unit = accumulation * world * (QUARTERS if growth > 1 else 1)
    if batch < 1 or batch % unit:
        below, above = batch // unit * unit, (batch // unit + 1) * unit
        nearest = f"{below} or {above}" if below else str(above)
        raise InputError(
            f"a batch of {batch} samples cannot be split evenly over {world} ranks x {accumulation} micro-batches"
            f"{', nor grow in quarters' if growth > 1 else ''}; write a multiple of {unit}, such as {nearest}"
        )


def side_at(size: Any, time: float, clock: Clock, multiple: int) -> int:
    """The side of a view in pixels at a nominal time: as given, or on a curve and then rounded to a multiple."""
    if isinstance(size, (int, float)):
        return round(size)
    return max(multiple, round(value_at(size, time, clock) / multiple) * multiple)
