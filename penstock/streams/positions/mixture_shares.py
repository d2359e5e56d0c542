"""Which of several sets each row of a mixture is taken from: a pure function of the row, at once for any row.

The sets are the leaves of a binary tree. Each inner node deals the rows it is given to its two parts as a line is drawn
on a grid (Bresenham 1965): after n rows the first part has the whole number nearest to its share of n. So a count needs
no walk from the beginning, only one division for each node, in whole numbers.

With two sets every prefix is within 1/2 of the share of each, so every window is within one row: the best there is.
Three or more sets cannot, for most shares, all be that even (Fraenkel's conjecture, proved for up to seven sets). Here
a prefix is off by at most `Shares.most_off` rows, below one for up to four sets, and a window by twice that; no method
can promise less than 1 - 1 / (2n - 2) for a prefix of n sets of any shares (Tijdeman 1980). Where weights change on the
way this holds for two sets as it is; with more, half a row is added for each whole that a part's share of its node goes
up or down in all, so at most one half for a curve that only falls.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np

MIXTURE_VERSION = 1  # raise it with any change of what `Shares` returns; a checkpoint of another version is refused
DENOMINATOR = 1 << 30  # of shares; products with it stay below 2^62

Tree = Any  # the number of a set, or a pair of trees


class Shares:
    """Deals rows to sets.

    Args:
        starts: the rows at which weights change, increasing, the first 0.
        weights: [stages][sets], of each stage; not negative, and some above 0 in each stage.
    """

    def __init__(self, starts: Sequence[int], weights: Sequence[Sequence[float]]):
        assert starts[0] == 0 and len(starts) == len(weights)
        self.starts = np.asarray(starts, dtype=np.int64)
        self.sets = len(weights[0])
        lengths = np.diff([*starts, starts[-1] + max(starts[-1], 1)])
        means = np.average(np.asarray(weights, dtype=np.float64), axis=0, weights=lengths).tolist()
        self.tree, self.most_off = _tree(means)
        self._root = _node(self.tree, len(starts))
        for stage, (start, row) in enumerate(zip(starts, weights, strict=True)):
            self._begin(self._root, stage, start, [_exact(weight) for weight in row])

    def owners(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The set of each row, and the row's number among those of its set; int64 like `rows`."""
        rows = np.asarray(rows, dtype=np.int64)
        sets, own = np.empty_like(rows), np.empty_like(rows)
        stages = np.searchsorted(self.starts, rows, side="right") - 1
        todo = [(self._root, np.arange(len(rows)), rows)]
        while todo:
            node, where, counts = todo.pop()
            if isinstance(node, int):
                sets[where], own[where] = node, counts
                continue
            first = node.first(stages[where], counts)
            goes = node.first(stages[where], counts + 1) > first
            todo.append((node.left, where[goes], first[goes]))
            todo.append((node.right, where[~goes], (counts - first)[~goes]))
        return sets, own

    def counts(self, row: int) -> list[int]:
        """How many of the rows before this one each set has."""
        found = [0] * self.sets
        for leaf, count in self._counts(self._root, self._stage(row), row):
            found[leaf] = count
        return found

    def _stage(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def _counts(self, node: "_Split | int", stage: int, count: int) -> Iterator[tuple[int, int]]:
        if isinstance(node, int):
            yield node, count
            return
        first = int(node.first(stage, count))
        yield from self._counts(node.left, stage, first)
        yield from self._counts(node.right, stage, count - first)

    def _begin(self, node: "_Split | int", stage: int, count: int, weights: list[Fraction]) -> Fraction:
        """Go on with new weights from what the stage before has led to; the weight of the node's sets."""
        if isinstance(node, int):
            return weights[node]
        first = int(node.first(stage - 1, count)) if stage else 0
        left = self._begin(node.left, stage, first, weights)
        both = left + self._begin(node.right, stage, count - first, weights)
        node.begin(stage, count, first, left / both if both else Fraction(0))
        return both


class _Split:
    """Deals rows to two parts. The arrays hold a number for each stage."""

    def __init__(self, left: "_Split | int", right: "_Split | int", stages: int):
        self.left, self.right = left, right
        self.since, self.done, self.rest, self.share, self.whole = np.zeros((5, stages), dtype=np.int64)

    def first(self, stage: Any, count: Any) -> Any:
        """How many of the node's first `count` rows its first part has; of numbers or arrays."""
        turns, more = np.divmod(count - self.since[stage], self.whole[stage])
        share = self.share[stage]  # turns are split off, so that no product overflows
        return self.done[stage] + turns * share + (self.rest[stage] + more * share) // self.whole[stage]

    def begin(self, stage: int, count: int, done: int, share: Fraction) -> None:
        """From row `count` on, of which the first part has `done`, deal with another share."""
        share = share.limit_denominator(DENOMINATOR)
        scale = DENOMINATOR // share.denominator  # parts of a row are kept as fine as they can be
        whole, rest = share.denominator * scale, share.denominator * scale // 2  # from 1/2 on: the nearest whole number
        if stage:  # what the first part had begun of its next row stays
            turn = int(self.whole[stage - 1])
            part = int(self.rest[stage - 1]) + int(count - self.since[stage - 1]) * int(self.share[stage - 1])
            rest = part % turn * whole // turn
        self.since[stage], self.done[stage], self.rest[stage] = count, done, rest
        self.share[stage], self.whole[stage] = share.numerator * scale, whole


def _exact(weight: float) -> Fraction:
    """As it is written in decimals: 0.1 is a tenth."""
    return Fraction(repr(float(weight)))


def _node(tree: Tree, stages: int) -> "_Split | int":
    return tree if isinstance(tree, int) else _Split(_node(tree[0], stages), _node(tree[1], stages), stages)


def _tree(weights: list[float]) -> tuple[Tree, list[float]]:
    """A tree in which no set is far off, and the most that a prefix can be off for each set, in rows.

    A part is off by 1/2 of its own, and by its share of what its node is off; so a set of weight w below nodes of
    weights W (the root aside, which is never off) by (1 + sum of w / W) / 2. Parts are joined so that this grows least.
    """
    groups: list[tuple[float, dict[int, float], Tree]] = [(w, {s: 0.0}, s) for s, w in enumerate(weights)]
    while len(groups) > 1:
        last = len(groups) == 2
        choices = []
        for a, b in combinations(range(len(groups)), 2):
            weight = groups[a][0] + groups[b][0]
            load = {
                s: part + (0.0 if last else weights[s] / weight) for g in (a, b) for s, part in groups[g][1].items()
            }
            choices.append((max(load.values()), weight, a, b, load))
        _, weight, a, b, load = min(choices, key=lambda choice: choice[:4])
        joined = (weight, load, (groups[a][2], groups[b][2]))
        groups = [group for number, group in enumerate(groups) if number not in (a, b)] + [joined]
    _, load, tree = groups[0]
    return tree, [(1 + load[s]) / 2 if len(weights) > 1 else 0.0 for s in range(len(weights))]
