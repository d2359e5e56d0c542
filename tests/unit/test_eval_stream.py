"""Evaluation reads every sample once, whatever the ranks, and all ranks do the same number of batches."""

import numpy as np
import pytest
import torch

from penstock.augment.crop_flip import CropFlip
from penstock.augment.none import NoAugmentation
from penstock.schedule import Clock, Linear
from penstock.streams.evaluation import EvalStream
from penstock.streams.images import Images
from tests.shards import damage, key_of, number_of, pixels_of, png, write_set

PLAIN = NoAugmentation(NoAugmentation.Config(size=8))


@pytest.mark.parametrize(("total", "world", "batch"), [(1003, 4, 32), (5, 4, 3), (1, 3, 2), (24, 2, 4)])
def test_exact_over_ranks(tmp_path, total, world, batch):
    images = Images(write_set(tmp_path, [total // 3, total - total // 3]))
    ranks = [list(EvalStream(images, PLAIN, batch=batch, rank=rank, world=world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = {}
    for each in (each for batches in ranks for each in batches):
        assert each.views[0].shape == (batch, 3, 8, 8)
        for slot, weight in enumerate(each.weights.tolist()):
            position = int(each.positions[slot])
            assert (weight == 0) == (position == -1)
            if weight:
                assert position not in seen
                seen[position] = each.keys[slot], int(number_of(each.views[0][slot].numpy())), int(each.labels[slot])
            else:
                assert each.labels[slot] == -1
        assert not each.faults
    assert seen == {number: (key_of(number), number, number % 10) for number in range(total)}


def test_it_can_be_iterated_again_and_workers_change_nothing(tmp_path):
    images = Images(write_set(tmp_path, [30, 11]))
    augment = CropFlip(CropFlip.Config(size=8))
    streams = [EvalStream(images, augment, batch=4, workers=workers) for workers in (0, 3)]
    first, again, forked = list(streams[0]), list(streams[0]), list(streams[1])
    assert len(first) == len(streams[0]) == 11
    for one, two, three in zip(first, again, forked, strict=True):
        assert torch.equal(one.views[0], two.views[0])
        assert torch.equal(one.views[0], three.views[0])
        assert one.keys == two.keys == three.keys


def test_a_subset_is_fixed_and_spread_over_the_classes(tmp_path):
    manifest = write_set(tmp_path, [200, 200], label=lambda number: number // 40)
    images = Images(manifest)

    def subset(world: int, seed: int = 0) -> list[str]:
        ranks = [EvalStream(images, PLAIN, batch=7, rank=r, world=world, limit=100, seed=seed) for r in range(world)]
        return sorted(key for stream in ranks for batch in stream for key in batch.keys if key)

    assert subset(1) == subset(3) == subset(4)
    assert len(subset(1)) == len(set(subset(1))) == 100
    assert subset(1) != subset(1, seed=1)
    assert len({int(key.removeprefix("sample")) // 40 for key in subset(1)}) == 10


def test_an_unreadable_sample_is_listed(tmp_path):
    manifest = write_set(tmp_path, [6])
    key = damage(manifest, 2)
    (batch,) = EvalStream(Images(manifest), PLAIN, batch=8)
    assert batch.weights.tolist() == [1, 1, 0, 1, 1, 1, 0, 0]
    assert [fault["key"] for fault in batch.faults] == [key]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, -1, -1]


def test_a_size_curve_is_taken_at_its_end(tmp_path):
    images = Images(write_set(tmp_path, [3], content=lambda number: png(np.ascontiguousarray(pixels_of(number)))))
    augment = NoAugmentation(NoAugmentation.Config(size=Linear(start=8, end=16)))
    (batch,) = EvalStream(images, augment, batch=3, clock=Clock(10, 3, 3))
    assert batch.views[0].shape[-1] == 16
