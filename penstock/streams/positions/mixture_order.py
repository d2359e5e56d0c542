"""The order in which one set, or several in turn, are served: where each row of the endless sequence lies.

A row is a sample's serving, `data.repeats` positions long. Each set of a mixture has its own order and its own epochs:
the n-th row that is dealt to it is row n of its order, whatever the weights. An epoch of the mixture is as many rows as
its sets have samples together; it says how long a run is, and no set need be through at its end.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from penstock.errors import InputError
from penstock.schedule import Clock, value_at
from penstock.splitmix import key, splitmix64_array
from penstock.streams.positions.mixture import Joined
from penstock.streams.positions.mixture_shares import MIXTURE_VERSION, Shares
from penstock.streams.positions.order import Order
from penstock.streams.positions.part import Part
from penstock.streams.sets.manifest import Manifest

SET_KEY = 0x5E7 << 48
MOST_STAGES = 4096  # of weights that follow curves, each of whole steps


@dataclass(frozen=True)
class Served:
    """One set as it is served; the only one has no name."""

    name: str
    manifest: Manifest
    part: Part
    order: Order
    first_shard: int

    @property
    def identity(self) -> dict[str, Any]:
        """What the rows of the set depend on."""
        known = {"manifest": self.manifest.identity, "samples_per_epoch": self.part.samples}
        known |= {"labels": f"{self.part.digest_of_ids:016x}", "repeats": self.part.repeats}
        return known | self.order.identity


class Course:
    """The rows of a run.

    Args:
        shares: who has which row; None with one set.
        known: what the identity of a mixture has besides that of its sets.
        weights: of each set, for the identity.
    """

    def __init__(
        self,
        sets: Sequence[Served],
        shares: Shares | None = None,
        known: Mapping[str, Any] | None = None,
        weights: Sequence[Any] = (),
    ):
        self.sets, self.shares, self.repeats = tuple(sets), shares, sets[0].part.repeats
        self._known, self._weights = dict(known or {}), tuple(weights)

    @classmethod
    def of(cls, manifest: Manifest, part: Any, seed: int, cut: Mapping[str, int], clock: Clock) -> "Course":
        """The course of `data.train`.

        Args:
            part: a `Part`, or a `JoinedPart` for a mixture.
            cut: the order's block, lanes and window.
        """
        if not isinstance(manifest, Joined):
            return cls([Served("", manifest, part, Order(part.sizes, seed, **cut), 0)])
        sets, weights = [], []
        for each, mine, first in zip(manifest.sets, part.parts, manifest.first, strict=True):
            order = Order(mine.sizes, key(seed, SET_KEY, _number(each.name)), **cut)
            sets.append(Served(each.name, each.manifest, mine, order, int(first)))
            weights.append(float(mine.samples) if each.options.weight == "size" else each.options.weight)
        known: dict[str, Any] = {"mixture_version": MIXTURE_VERSION, "classes": manifest.identity}
        plain = [weight if isinstance(weight, float) else weight.model_dump(mode="json") for weight in weights]
        if any(isinstance(weight, dict) for weight in plain):
            known["clock"] = [clock.total, clock.batch]
        return cls(sets, Shares(*_stages(weights, clock, part.repeats)), known, plain)

    @property
    def identity(self) -> dict[str, Any]:
        """What the position -> sample map depends on; for the checkpoint."""
        if self.shares is None:
            return self.sets[0].identity
        pairs = zip(self.sets, self._weights, strict=True)
        return self._known | {"sets": {each.name: each.identity | {"weight": weight} for each, weight in pairs}}

    def own(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The number of each row's set, and the row's number among those of its set."""
        rows = np.asarray(rows, dtype=np.int64)
        return (np.zeros_like(rows), rows) if self.shares is None else self.shares.owners(rows)

    def counts(self, row: int) -> list[int]:
        """How many of the rows before this one each set has."""
        return [row] if self.shares is None else self.shares.counts(row)

    def positions(self, position: int) -> list[int]:
        """How many of the positions before this one each set has."""
        row, again = divmod(position, self.repeats)
        found = [count * self.repeats for count in self.counts(row)]
        found[int(self.own(np.array([row]))[0][0])] += again
        return found

    def of_rank(self, positions: np.ndarray, rank: int, world: int) -> np.ndarray:
        """The positions of a micro-batch that a rank serves: an equal number, and of each set to within one.

        Of one set every world-th: when the world size divides the lanes, those are always the same lanes of an epoch.
        Of several, in an order drawn anew each time, for weights may follow a rhythm that the number of ranks, or half
        a batch (which mixup pairs), follows, too. A sample's servings stay together.
        """
        if self.shares is None:
            return positions[rank::world]
        rows = positions // self.repeats
        mine = positions[np.lexsort((positions, self.own(rows)[0]))][rank::world]
        return mine[np.lexsort((mine, splitmix64_array(mine // self.repeats)))]

    def shares_of(self, begin: int, end: int) -> dict[str, float]:
        """Of each set of a mixture its share of the positions from `begin` to `end`, and its own epochs until then."""
        if self.shares is None:
            return {}
        found, counts = {}, zip(self.sets, self.positions(begin), self.positions(end), strict=True)
        for each, before, after in counts:
            found[f"data/{each.name}_share"] = (after - before) / (end - begin)
            found[f"data/{each.name}_epoch"] = after / each.part.round
        return found

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard numbers, numbers within the shard, and the epoch of the sample's own set, int64 like `rows`."""
        sets, own = self.own(rows)
        shards, samples, epochs = np.empty_like(own), np.empty_like(own), np.empty_like(own)
        for number in np.unique(sets).tolist():
            here, each = sets == number, self.sets[number]
            found, nth = each.order.locate(own[here])
            shards[here], samples[here] = each.first_shard + found, each.part.numbers(found, nth)
            epochs[here] = own[here] // each.part.samples
        return shards, samples, epochs


def _stages(weights: Sequence[Any], clock: Clock, repeats: int) -> tuple[list[int], list[list[float]]]:
    """The rows at which weights change, and what they are from there on."""
    if all(isinstance(weight, (int, float)) for weight in weights):
        return [0], [[float(weight) for weight in weights]]
    found: dict[int, list[float]] = {}
    last: list[float] = []
    for step in range(0, clock.total, -(-clock.total // MOST_STAGES)):
        now = [value_at(weight, step, clock) for weight in weights]
        if max(now) <= 0:
            raise InputError(f"data.train: all weights are 0 at step {step}; let one of them stay above 0")
        if now != last:
            found[-(-step * clock.batch // repeats)] = last = now
    return list(found), list(found.values())


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
