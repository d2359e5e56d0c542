"""The order in which samples are served: a pure function of (shard sizes, seed, position).

A position is a sample's place in an endless sequence. Epoch e is positions [e * N, (e + 1) * N), so there is no tail
to drop or pad, and a batch may straddle epochs. Inside an epoch:

1. blocks of neighbouring samples of a shard are permuted by (seed, epoch);
2. the permuted sequence is cut into `lanes` runs of equal length (to within one), and position p reads lane p % lanes,
   so a batch draws from many places of the data;
3. in each lane, windows of consecutive samples are permuted by (seed, epoch, lane, window).

A rank serves every R-th position; when R divides the number of lanes it therefore stays inside its own lanes, and
reads only their blocks. Memory is O(blocks), at most about a million, whatever the number of samples.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from penstock.splitmix import key, splitmix64_array

ORDER_VERSION = 1  # raise it with any change of what `locate` returns; a checkpoint of another version is refused
MOST_BLOCKS = 1 << 20
BLOCKS_PER_LANE = 16  # at least, where the data allows: a small set fits in memory and mixes better in finer blocks
BLOCK_KEY, WINDOW_KEY = 0xB10C << 48, 0x314D << 48  # apart from each other and from any position or step


def permutation(length: int, state: int) -> np.ndarray:
    """A permutation of range(length), int64, keyed by a 64-bit number.

    Libraries change their shuffles between versions; sorting by a hash never changes. The hash is a bijection, so no
    two sort keys are equal.
    """
    hashes = splitmix64_array(np.arange(length, dtype=np.uint64) ^ np.uint64(state))
    return np.argsort(hashes, kind="stable")


class _Recent:
    """The last `limit` values of a function."""

    def __init__(self, limit: int):
        self.limit, self.values = limit, OrderedDict[tuple[int, ...], Any]()

    def get(self, name: tuple[int, ...], make: Callable[..., Any]) -> Any:
        if name in self.values:
            self.values.move_to_end(name)
        else:
            self.values[name] = make(*name)
            if len(self.values) > self.limit:
                self.values.popitem(last=False)
        return self.values[name]


class Order:
    """Where each position of the endless sequence lies.

    Args:
        shard_sizes: number of samples in each shard.
        block: the most neighbouring samples that stay together; fewer in a small set, more in a huge one.
        lanes: how many places of the permuted data are read side by side.
        window: samples permuted among each other within a lane.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, block: int = 256, lanes: int = 64, window: int = 4096):
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.samples = int(self.sizes.sum())
        if self.samples == 0:
            raise ValueError("an order needs at least one sample")
        self.seed, self.lanes, self.window = seed, lanes, window
        self.block = min(block, max(1, self.samples // (BLOCKS_PER_LANE * lanes)))
        while self._block_counts().sum() > max(MOST_BLOCKS, len(self.sizes)):
            self.block *= 2
        self._first_block = np.concatenate([[0], np.cumsum(self._block_counts())])
        self._epochs = _Recent(3)
        self._windows = _Recent(3 * lanes)

    @property
    def identity(self) -> dict[str, int]:
        """What, beside the shard sizes, the order depends on."""
        return {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "lanes": self.lanes,
            "block": self.block,
            "window": self.window,
        }

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard numbers and numbers within the shard, both int64 like `positions`."""
        positions = np.asarray(positions, dtype=np.int64)
        shards, samples = np.empty_like(positions), np.empty_like(positions)
        epochs, places = np.divmod(positions, self.samples)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            shards[chosen], samples[chosen] = self._locate(epoch, places[chosen])
        return shards, samples

    def _locate(self, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        blocks, ends = self._epochs.get((epoch,), self._permuted_blocks)
        sequence = self._in_sequence(epoch, places)
        number = np.searchsorted(ends, sequence, side="right")
        block = blocks[number].astype(np.int64)
        begins = np.where(number > 0, ends[number - 1], 0)
        shard = np.searchsorted(self._first_block, block, side="right") - 1
        return shard, (block - self._first_block[shard]) * self.block + sequence - begins

    def _in_sequence(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Indices into the sequence of permuted blocks, for places in [0, N) of an epoch."""
        shortest, longer = divmod(self.samples, self.lanes)  # the first `longer` lanes hold one sample more
        rows, lanes = np.divmod(places, self.lanes)
        windows, inside = np.divmod(rows, self.window)
        groups, group = np.unique(np.stack([lanes, windows]), axis=1, return_inverse=True)
        group = group.reshape(-1)
        moved = np.empty_like(rows)
        for number, (lane, window) in enumerate(groups.T.tolist()):
            permuted = self._windows.get((epoch, lane, window), self._permuted_window)
            chosen = group == number
            moved[chosen] = permuted[inside[chosen]]
        return lanes * shortest + np.minimum(lanes, longer) + windows * self.window + moved

    def _permuted_window(self, epoch: int, lane: int, window: int) -> np.ndarray:
        shortest, longer = divmod(self.samples, self.lanes)
        length = min(self.window, shortest + (lane < longer) - window * self.window)
        return permutation(length, key(self.seed, WINDOW_KEY, epoch, lane, window)).astype("i4")

    def _block_counts(self) -> np.ndarray:
        return -(-self.sizes // self.block)

    def _permuted_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The block numbers in this epoch's order, and where each ends in the sequence of samples."""
        counts = self._block_counts()
        lengths = np.full(int(counts.sum()), self.block, dtype=np.int64)
        filled = counts > 0
        lengths[self._first_block[1:][filled] - 1] = (self.sizes - (counts - 1) * self.block)[filled]
        blocks = permutation(len(lengths), key(self.seed, BLOCK_KEY, epoch)).astype("i4")
        return blocks, np.cumsum(lengths[blocks])
