"""Sizes on a curve, batches that grow, label subsets, repeats: still a pure function of the position."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from penstock.augment.none import NoAugmentation
from penstock.errors import InputError
from penstock.schedule import Clock, Length, Linear, Step
from penstock.streams.batch import Batch
from penstock.streams.data import Data
from penstock.streams.positions.digest import EpochDigest
from penstock.streams.positions.part import Part, parse_labels
from penstock.streams.reader import ShardReader
from penstock.streams.sets.manifest import Manifest
from penstock.streams.train import TrainStream
from tests.shards import write_set

SIZES = [20, 3, 0, 41, 33]
BATCH, TOTAL = 16, 30
STAGES = Step(start=8, milestones=[Length(10, "steps"), Length(20, "steps")], values=[12, 16])
RISING = Linear(start=4, end=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"), SIZES).root


def stream(folder: Path, size=STAGES, growth=4.0, *, batch=BATCH, accumulation=1, rank=0, world=1, **data):
    return TrainStream(
        Data.Config(train=folder, **({"workers": 0, "lanes": 4} | data)),
        NoAugmentation(NoAugmentation.Config(size=size)),
        batch=batch,
        accumulation=accumulation,
        rank=rank,
        world=world,
        seed=3,
        clock=Clock(TOTAL, batch, sum(SIZES)),
        size_multiple=4,
        growth=growth,
    )


def steps(one: TrainStream, since: int = 0, step: int = 0) -> list[Batch]:
    """The micro-batches up to the end of the run."""
    found, position = [], since
    for batch in one.batches(since, step):
        found.append(batch)
        position += len(batch) * one.world
        if position >= one.clock.samples:
            return found
    raise AssertionError


def test_a_size_given_as_a_number_is_not_rounded(folder):
    """176 pixels are no multiple of 32, and torchvision's recipe for ResNet-50 means them."""
    assert [stream(folder, size).knobs_at(0)["size"] for size in (6, 10.0, Linear(start=6, end=16))] == [6, 10, 8]


@pytest.mark.parametrize("size", [STAGES, RISING])
@pytest.mark.parametrize("growth", [1.0, 2.0, 4.0])
def test_a_run_sees_the_same_samples_whatever_its_batches(folder, size, growth):
    one = stream(folder, size, growth)
    served = steps(one)
    positions = [p for batch in served for p in batch.positions.tolist()]
    assert positions == list(range(BATCH * TOTAL))
    sides = [batch.views[0].shape[-1] for batch in served]
    assert sides == sorted(sides) and sides[-1] == 16 and sides[0] < 16 and all(side % 4 == 0 for side in sides)
    for batch, side in zip(served[:-1], sides[:-1], strict=True):
        room = min((16 / side) ** 2, growth)
        assert len(batch) == BATCH * np.floor(4 * room) / 4  # in quarters of the batch
    assert (len(served) == TOTAL) == (growth == 1.0)


@pytest.mark.parametrize("workers", [0, 3])
def test_every_rank_changes_size_and_batch_at_the_same_step(folder, workers):
    alone = steps(stream(folder))
    parts = [steps(stream(folder, rank=rank, world=2, accumulation=2, workers=workers, prefetch=4)) for rank in (0, 1)]
    for step, whole in enumerate(alone):
        micros = [batch for part in parts for batch in part if batch.step == step]
        assert len(micros) == 4 and {batch.views[0].shape[-2:] for batch in micros} == {whole.views[0].shape[-2:]}
        keys = Counter(key for batch in micros for key in batch.keys)
        assert keys == Counter(whole.keys)
        assert {batch.begin for batch in micros} == {whole.begin, whole.begin + len(whole) // 2}


@pytest.mark.parametrize("done", [1, 2, 3, 5, 9])
def test_a_resume_continues_with_the_size_and_batch_of_its_place(folder, done):
    whole = steps(stream(folder))
    since = sum(len(batch) for batch in whole[:done])
    again = steps(stream(folder, workers=2), since, done)
    assert [b.step for b in again] == [b.step for b in whole[done:]]
    for mine, theirs in zip(again, whole[done:], strict=True):
        assert mine.keys == theirs.keys and mine.views[0].equal(theirs.views[0])


def test_a_batch_that_cannot_grow_in_quarters_is_refused(folder):
    with pytest.raises(InputError, match="a multiple of 8, such as 8 or 16"):
        stream(folder, batch=12, world=2)
    stream(folder, batch=12, world=2, growth=1.0)


# Labels ---------------------------------------------------------------------------------------------------------------


def chosen(root: Path, labels: str | None, seed: int = 0) -> list[str]:
    reader = ShardReader(Manifest.load(root))
    part = Part(reader, labels, seed)
    keys = []
    for shard, size in enumerate(part.sizes):
        numbers = part.numbers(np.full(size, shard), np.arange(size))
        keys += [reader.record(shard, int(number)).key for number in numbers]
    return keys


def test_a_share_of_the_labels_is_one_of_every_class_and_nested(folder):
    everything = chosen(folder, None)
    assert len(everything) == len(set(everything)) == 97
    few, more, most = (chosen(folder, f"{percent}%") for percent in (10, 30, 100))
    assert set(few) < set(more) < set(most) == set(everything)
    label = {key: int(key.removeprefix("sample")) % 10 for key in everything}
    assert Counter(label[key] for key in few) == dict.fromkeys(range(10), 1)
    assert Counter(label[key] for key in more) == dict.fromkeys(range(10), 3)
    assert set(Counter(label[key] for key in chosen(folder, "4 per class")).values()) == {4}
    assert set(few) <= set(chosen(folder, "4 per class"))
    assert chosen(folder, "10%", seed=1) != few


def test_the_subset_does_not_depend_on_the_shards(folder, tmp_path):
    other = write_set(tmp_path, [97]).root
    assert sorted(chosen(other, "30%")) == sorted(chosen(folder, "30%"))


def test_training_on_a_subset_serves_it_once_an_epoch(folder):
    one = stream(folder, growth=1.0, labels="30%", batch=10)
    assert one.samples_per_epoch == 30
    digest, served = EpochDigest(one.part), []
    for number, batch in enumerate(islice(one.batches(0), 9)):
        digest.add(batch)
        served += batch.keys
        digest.check((number + 1) * 10)
    assert digest.checked == 3
    for epoch in range(3):
        assert sorted(served[30 * epoch : 30 * epoch + 30]) == sorted(chosen(folder, "30%", seed=3))
    with pytest.raises(InputError, match="chooses other samples"):
        stream(folder, labels="10%").check_identity(one.identity)


@pytest.mark.parametrize("rule", ["0%", "101%", "ten", "0 per class", "5", "-1%", "%"])
def test_what_says_no_number_of_labels_is_refused(rule):
    with pytest.raises(ValueError, match="4 per class"):
        parse_labels(rule)


def test_more_labels_than_there_are_are_refused(folder):
    with pytest.raises(InputError, match="class 7 has 9 samples"):
        chosen(folder, "10 per class")


# Repeats --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
def test_repeats_are_neighbours_and_a_round_serves_each_sample_that_often(folder, world):
    parts = [stream(folder, growth=1.0, repeats=3, batch=12, rank=rank, world=world) for rank in range(world)]
    digest, keys = EpochDigest(parts[0].part), {}
    loaders = [one.batches(0) for one in parts]
    for number in range(3 * 97 // 12 + 1):
        for loader in loaders:
            batch = next(loader)
            digest.add(batch)
            keys |= dict(zip(batch.positions.tolist(), batch.keys, strict=True))
        assert digest.check((number + 1) * 12) == ([0] if number == 24 else [])
    for first in range(0, 3 * 97, 3):
        assert keys[first] == keys[first + 1] == keys[first + 2]
    assert set(Counter(keys[p] for p in range(3 * 97)).values()) == {3}


def test_fewer_samples_than_repeats_still_give_whole_batches(tmp_path):
    """DeiT's sampler gives none below 256."""
    root = write_set(tmp_path, [5]).root
    assert [len(batch) for batch in islice(stream(root, growth=1.0, repeats=3, batch=4).batches(0), 9)] == [4] * 9
