"""What a run's network sees of some samples: keyed by seed, position and view as in training."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from penstock.augment import AUGMENTATIONS
from penstock.errors import InputError
from penstock.mixing import Mixing
from penstock.recipe import Block, Source, check, one_of
from penstock.schedule import Clock, Duration, value_at
from penstock.streams.batch import Batch
from penstock.streams.data import Data
from penstock.streams.loader import assemble
from penstock.streams.train import TrainStream

if TYPE_CHECKING:
    from penstock.streams.images import Sample

CHUNK = 1 << 20  # positions looked through at once
LEAST = 0.005  # share of a class in a target that is told


class Shown(Block):
    """The part of any stage's recipe that decides what the network sees."""

    seed: int = Field(0, ge=0)
    duration: Duration
    batch: int = Field(gt=0)
    batch_growth: float = Field(1.0, ge=1)
    data: Data.Config
    augment: one_of("penstock.augment")  # type: ignore[valid-type]
    mix: Mixing.Config | None = None
    backbone: Any = Field(None, description="as written: what sizes on a curve are rounded to depends on it")


@dataclass(frozen=True)
class View:
    """A view as the network gets it, or the reason why it cannot be had."""

    pixels: np.ndarray | None  # uint8 [H, W, C]
    position: int
    number: int  # of the view, where a sample has several
    reason: str = ""


class Viewer:
    """The views of a recipe, one process having the whole batch."""

    def __init__(self, recipe: Shown):
        self.recipe = recipe
        augment = AUGMENTATIONS.get(recipe.augment.name)(recipe.augment)
        data = recipe.data.model_copy(update={"val": None, "cache": "none"})
        samples = Data(data, recipe.seed).part.samples
        self.clock = Clock.of(recipe.duration, recipe.batch, samples)
        self.stream = TrainStream(
            data,
            augment,
            batch=recipe.batch,
            accumulation=1,
            rank=0,
            world=1,
            seed=recipe.seed,
            clock=self.clock,
            size_multiple=size_multiple(recipe),
            growth=recipe.batch_growth,
        )
        self._begins = [0]
        self.round = self.stream.part.round  # positions in an epoch, or in as many as a sample is repeated

    def first_positions(self, epoch: int, count: int) -> list[int]:
        """Positions of the first `count` samples that are served in an epoch."""
        if epoch * self.round >= max(self.clock.samples, 1):
            last = (self.clock.samples - 1) // self.round
            raise InputError(f"--epoch {epoch} is after the end of the run, whose last epoch is number {last}")
        return [epoch * self.round + sample * self.stream.part.repeats for sample in range(min(count, self._samples))]

    def servings(self, positions: list[int], count: int) -> dict[int, list[int]]:
        """For each position, the next `count` ones, itself included, at which its sample is served."""
        repeats, rows = self.stream.part.repeats, np.array(positions) // self.stream.part.repeats
        wanted = _codes(*self._locate(np.array(positions)))
        order = np.argsort(wanted)
        found: dict[int, list[int]] = {position: [] for position in positions}
        row, end = int(rows.min()), math.inf
        if self.stream.course.shares is not None:  # a sample may never come again, when a weight falls to 0
            end = self.clock.samples / repeats
        while any(len(served) < count for served in found.values()) and row < end:
            places = np.arange(row, row + min(CHUNK, self._samples), dtype=np.int64)
            codes = _codes(*self._locate(places * repeats))
            for hit in np.flatnonzero(np.isin(codes, wanted)).tolist():
                position = positions[order[np.searchsorted(wanted[order], codes[hit])]]
                found[position] += range(int(places[hit]) * repeats, (int(places[hit]) + 1) * repeats)
            row += len(places)
        return {position: served[:count] for position, served in found.items()}

    def sample(self, position: int) -> "Sample":
        shard, number = self._locate(np.array([position]))
        return self.stream.images.load(int(shard[0]), int(number[0]))

    def views(self, position: int) -> Iterator[View]:
        """Every view of the sample at a position."""
        batch = self._batch(np.array([position]))
        for number, view in enumerate(batch.views):
            if batch.weights[0]:
                yield View(view[0].permute(1, 2, 0).numpy(), position, number)
            else:
                yield View(None, position, number, batch.faults[0]["reason"])

    def knobs(self, position: int) -> dict[str, float]:
        """The augmentation's knobs for the step that a position belongs to."""
        return self.stream.knobs_at(self._begin(position))

    def mixed(self, epoch: int, count: int) -> list[tuple[View, list[str]]]:
        """The first `count` mixed images of an epoch's first whole batch, each with its soft target's parts in words.

        Sample i of B is mixed with i + B // 2, so half of what is asked for is taken from each half of the batch.
        """
        mix = self.recipe.mix
        if mix is None:
            return []
        if not self.stream.classes:
            raise InputError(f"mix: {self.recipe.data.train} has no classes to mix; set mix=null")
        begin = self._begin(epoch * self.round)
        if begin < epoch * self.round:
            begin += self.stream.batch_at(begin)
        size = self.stream.batch_at(begin)
        firsts = begin + np.arange(min((count + 1) // 2, size // 2), dtype=np.int64)
        batch = self._batch(np.concatenate([firsts, firsts + size // 2]))
        targets = F.one_hot(batch.labels.clamp(min=0), len(self.stream.classes)).float()
        values = {name: value_at(knob, begin / self.recipe.batch, self.clock) for name, knob in mix.knobs().items()}
        images, targets = Mixing(mix, self.recipe.seed)(
            batch.views[0].float(), targets, batch.positions, batch.weights, values, batch_key=begin
        )
        pixels = images.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [
            (View(image, position, 0), self._in_words(target))
            for image, position, target in zip(pixels, batch.positions.tolist(), targets, strict=True)
        ]

    @property
    def _samples(self) -> int:
        return self.stream.part.samples

    def _begin(self, position: int) -> int:
        """The first position of the step that a position belongs to."""
        if self.recipe.batch_growth == 1:
            return position // self.recipe.batch * self.recipe.batch
        while self._begins[-1] <= position:
            self._begins.append(self._begins[-1] + self.stream.batch_at(self._begins[-1]))
        return self._begins[bisect_right(self._begins, position) - 1]

    def _locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shards, samples, _ = self.stream.course.locate(positions // self.stream.part.repeats)
        return shards, samples

    def _batch(self, positions: np.ndarray) -> Batch:
        # The number of the step, which nothing here depends on, is left at 0.
        micro = self.stream.micro(positions, self.knobs(int(positions[0])))
        batch = assemble(micro, self.stream.images, self.stream.augment, self.recipe.seed)
        return batch if self.stream.after is None else self.stream.after(batch, micro)

    def _in_words(self, target: torch.Tensor) -> list[str]:
        shares, classes = target.sort(descending=True)
        names: Any = self.stream.classes
        told = zip(shares.tolist(), classes.tolist(), strict=True)
        return [f"{share:.2f} {names[label]}" for share, label in told if share > LEAST]


def size_multiple(recipe: Shown) -> int:
    """Of the backbone, which is built for it, without its weights, where the size follows a curve."""
    if isinstance(recipe.augment.size, (int, float)) or recipe.backbone is None:
        return 1
    from penstock.backbones import Backbone

    block = {"name": recipe.backbone} if isinstance(recipe.backbone, str) else {**recipe.backbone, "weights": None}
    with torch.device("meta"):
        return Backbone(check(Backbone.Config, Source(values=block))).size_multiple


def _codes(shards: np.ndarray, samples: np.ndarray) -> np.ndarray:
    return (shards << 40) | samples
