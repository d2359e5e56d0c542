"""The order against a slow transcription, its golden file, and the promise of exactly once."""

import json
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from penstock.splitmix import key, splitmix64
from penstock.streams.positions.order import BLOCK_KEY, ORDER_VERSION, WINDOW_KEY, Order, permutation

GOLDEN = Path(__file__).parent / "golden_order_v1.json"
SHAPES = [
    ([1], 1, {}),
    ([97], 97, {}),
    ([3, 0, 5, 1], 9, {"lanes": 64}),
    ([40, 41, 2, 17], 100, {"block": 8, "lanes": 3, "window": 5}),
    ([500, 300, 211], 1011, {"block": 16, "lanes": 4, "window": 32}),
]


def slow_epoch(sizes: list[int], seed: int, epoch: int, block: int, lanes: int, window: int) -> list[tuple[int, int]]:
    """An epoch's samples in order, written from the description with lists alone."""

    def shuffled(things: list, state: int) -> list:
        return [things[i] for i in sorted(range(len(things)), key=lambda i: splitmix64(i ^ state))]

    blocks = [
        [(shard, number) for number in range(begin, min(begin + block, size))]
        for shard, size in enumerate(sizes)
        for begin in range(0, size, block)
    ]
    sequence = [sample for each in shuffled(blocks, key(seed, BLOCK_KEY, epoch)) for sample in each]
    rows, total = [], len(sequence)
    for lane in range(lanes):
        length = total // lanes + (lane < total % lanes)
        mine, sequence = sequence[:length], sequence[length:]
        parts = [mine[begin : begin + window] for begin in range(0, length, window)]
        rows.append([s for w, part in enumerate(parts) for s in shuffled(part, key(seed, WINDOW_KEY, epoch, lane, w))])
    return [row[k] for k in range(-(-total // lanes)) for row in rows if k < len(row)]


def served(order: Order, positions: range) -> list[tuple[int, int]]:
    return list(zip(*(part.tolist() for part in order.locate(np.array(positions))), strict=True))


@pytest.mark.parametrize(("sizes", "total", "options"), SHAPES)
def test_equals_the_slow_transcription(sizes, total, options):
    order = Order(sizes, seed=5, **options)
    for epoch in range(3):
        expected = slow_epoch(sizes, 5, epoch, order.block, order.lanes, order.window)
        assert served(order, range(epoch * total, (epoch + 1) * total)) == expected
        assert len(set(expected)) == total


def test_one_call_may_span_many_epochs_in_any_order():
    order = Order([3, 4], seed=1)
    positions = random.Random(0).sample(range(70), 70)
    expected = [served(order, range(position, position + 1))[0] for position in positions]
    assert list(zip(*(part.tolist() for part in order.locate(np.array(positions))), strict=True)) == expected
    assert set(Counter(expected).values()) == {10}


def test_epochs_and_seeds_differ():
    order, other = Order([1000], seed=1), Order([1000], seed=2)
    assert len({tuple(served(order, range(e * 1000, e * 1000 + 1000))) for e in range(3)}) == 3
    assert served(order, range(1000)) != served(other, range(1000))


def test_golden_file():
    """A change of this file's numbers changes every run's data: raise ORDER_VERSION with it."""
    golden = json.loads(GOLDEN.read_text())
    assert golden["order_version"] == ORDER_VERSION
    for case in golden["cases"]:
        order = Order(case["sizes"], case["seed"], case["block"], case["lanes"], case["window"])
        located = np.stack(order.locate(np.array(case["positions"])), 1).tolist()
        assert located == case["located"], case["sizes"]


def test_permutation_is_a_permutation_and_keyed():
    assert sorted(permutation(1000, 7).tolist()) == list(range(1000))
    assert permutation(1000, 7).tolist() != permutation(1000, 8).tolist()


def test_permutation_is_uniform():
    counts = Counter(tuple(permutation(4, splitmix64(number)).tolist()) for number in range(24_000))
    chi_squared = sum((counts[each] - 1000) ** 2 / 1000 for each in counts)
    assert len(counts) == 24
    assert chi_squared < 50  # 23 degrees of freedom: passed by chance with probability 0.999


def test_ten_million_samples_take_little_memory():
    tracemalloc.start()
    order = Order([10_000] * 1000, seed=0)
    peaks = []
    for epoch in range(3):
        for begin in range(epoch * 10_000_000, (epoch + 1) * 10_000_000, 2_500_000):
            order.locate(np.arange(begin, begin + 4096))
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert peaks[-1] < 60e6
    assert peaks[-1] < 1.3 * peaks[0]


def test_blocks_stay_below_a_million():
    order = Order([10_000] * 100_000, seed=0)  # 1e9 samples
    assert order._first_block[-1] <= 1 << 20
    assert order.block >= 1024


def test_classes_mix_on_class_sorted_shards():
    """1000 classes in sorted shards: a batch of 256 holds nearly the 226 distinct classes that a full shuffle gives."""
    per_class = 256
    order = Order([per_class * 10] * 100, seed=3)
    distinct = []
    for step in [*range(20), *range(500, 520), *range(900, 920)]:
        shards, samples = order.locate(np.arange(step * 256, (step + 1) * 256))
        distinct.append(len(np.unique((shards * per_class * 10 + samples) // per_class)))
    assert 215 < np.mean(distinct) < 240
    assert min(distinct) > 190


def test_a_rank_touches_only_its_own_blocks():
    """With ranks that divide the lanes, two ranks share no more blocks than lane borders make them."""
    order = Order([10_000] * 10, seed=0, lanes=16)
    positions = np.arange(100_000)
    blocks = [
        {(s, n // order.block) for s, n in zip(*order.locate(positions[rank::8]), strict=True)} for rank in range(8)
    ]
    assert sum(len(each) for each in blocks) <= len(set().union(*blocks)) + 16


def test_random_chains_of_restarts_serve_each_position_once():
    """Kill anywhere, continue with other ranks, batch and workers: positions done are a prefix, each served once."""
    draw = random.Random(1)
    for _ in range(20):
        total, position, done = draw.choice([53, 128, 1000]), 0, []
        order = Order([total], seed=0)
        for _ in range(6):
            world, accumulation = draw.choice([1, 2, 3, 5, 8]), draw.choice([1, 2, 3])
            batch = world * accumulation * draw.randint(1, 9)
            for _ in range(draw.randint(0, 5)):
                for rank in range(world):
                    done += range(position + rank, position + batch, world)
                position += batch
        assert sorted(done) == list(range(position))
        counts = Counter(served(order, range(position // total * total)))
        assert set(counts.values()) <= {position // total}
