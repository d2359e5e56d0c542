"""The samples of a packed set that a run trains on: all of them, or a fixed share with labels."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import AfterValidator

from penstock.errors import InputError
from penstock.splitmix import key, splitmix64_array
from penstock.streams.reader import ShardReader
from penstock.streams.sets.index import digest_of

LABELS_KEY = 0x1AB37 << 44
MASK = (1 << 64) - 1


def parse_labels(rule: str) -> tuple[float, int]:
    """(share, 0) of '10%', or (1, number) of '4 per class'. Raises ValueError otherwise."""
    match = re.fullmatch(r"\s*(?:([0-9.]+)\s*%|([0-9]+)\s*per\s*class)\s*", rule)
    share, number = (float(match[1] or 100) / 100, int(match[2] or 0)) if match else (0.0, 0)
    if not (match and 0 < share <= 1 and (match[1] or number)):
        raise ValueError(f"{rule!r} says no number of labels; write '10%' or '4 per class'")
    return share, number


def _checked(rule: str) -> str:
    parse_labels(rule)
    return rule


LabelShare = Annotated[str, AfterValidator(_checked)]  # in recipes


class Part:
    """Which samples of a set are served, and how often in a row.

    Args:
        labels: '10%' takes a share of every class, '4 per class' a number; None takes all. Which ones is a function of
            the seed and the samples' ids alone, so larger shares contain the smaller ones.
        repeats: times a sample is served in a row, each with its own augmentation (Hoffer et al. 2020).
        asked: the recipe's key that holds `labels`.
    """

    def __init__(
        self,
        reader: ShardReader,
        labels: str | None = None,
        seed: int = 0,
        repeats: int = 1,
        asked: str = "data.labels",
    ):
        manifest = reader.manifest
        self.root, self.repeats = manifest.root, repeats
        self.chosen: np.ndarray | None = None  # numbers within the set, increasing; None for all
        self._numbers: list[np.ndarray] | None = None
        self.sizes: Sequence[int] = [shard.samples for shard in manifest.shards]
        self.samples, self.digest_of_ids = manifest.samples, manifest.digest_of_ids
        if labels is not None:
            ids = [reader.column(shard, "id") for shard in range(len(self.sizes))]
            classes = [reader.column(shard, "label") for shard in range(len(self.sizes))]
            all_ids, all_labels = np.concatenate(ids), np.concatenate(classes)
            self.chosen = chosen = _choose(all_ids, all_labels, labels, seed, asked, str(self.root))
            bounds = np.cumsum([0, *self.sizes])
            self._numbers = [
                chosen[np.searchsorted(chosen, begin) : np.searchsorted(chosen, end)] - begin
                for begin, end in pairwise(bounds.tolist())
            ]
            self.sizes = [len(numbers) for numbers in self._numbers]
            self.samples, self.digest_of_ids = len(chosen), digest_of(all_ids[chosen])

    @property
    def round(self) -> int:
        """Positions after which every sample was served `repeats` times."""
        return self.samples * self.repeats

    @property
    def digest_of_round(self) -> int:
        """Checksum of the ids served in a round (penstock/streams/positions/digest.py)."""
        return self.digest_of_ids * self.repeats & MASK

    def numbers(self, shards: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Numbers within their shards of the `samples`-th chosen ones of `shards`."""
        if self._numbers is None:
            return samples
        return np.array([self._numbers[s][n] for s, n in zip(shards.tolist(), samples.tolist(), strict=True)])


def _choose(ids: np.ndarray, labels: np.ndarray, rule: str, seed: int, asked: str, root: str) -> np.ndarray:
    """Increasing numbers of the samples whose keyed hash is among the smallest of their class."""
    share, number = parse_labels(rule)
    if (labels < 0).any():
        raise InputError(f"{asked}: {int((labels < 0).sum())} samples of {root} have no label; pack it with classes")
    order = np.lexsort((splitmix64_array(ids ^ np.uint64(key(seed, LABELS_KEY))), labels))
    counts = np.bincount(labels)
    if (short := np.flatnonzero((counts > 0) & (counts < number))).size:
        raise InputError(
            f"{asked}: {rule} of {root}, but class {short[0]} has {counts[short[0]]} samples; ask for less"
        )
    first = np.cumsum(counts) - counts
    take = np.minimum(counts, number) if number else np.ceil(counts * share - 1e-9).astype(np.int64)
    return np.sort(np.concatenate([order[begin : begin + n] for begin, n in zip(first, take, strict=True)]))
