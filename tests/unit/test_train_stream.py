"""Promises 1 and 2 on the stream itself: exactly once, and the same pixels."""

import ctypes
import mmap
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.augment.crop_flip import CropFlip
from penstock.augment.none import NoAugmentation
from penstock.augment.simclr import SimCLR
from penstock.errors import InputError
from penstock.schedule import Clock, Step
from penstock.streams.batch import Batch
from penstock.streams.data import Data
from penstock.streams.loader import _start_worker
from penstock.streams.train import TrainStream
from tests.shards import damage, key_of, number_of, pixels_of, png, write_set

SIZES = [20, 3, 0, 41, 33]  # 97 samples, a prime
TOTAL = sum(SIZES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"), SIZES).root


def stream(folder: Path, augment=None, *, batch=24, accumulation=1, rank=0, world=1, seed=0, **data) -> TrainStream:
    return TrainStream(
        Data.Config(train=folder, **({"workers": 0, "lanes": 4} | data)),
        augment or NoAugmentation(NoAugmentation.Config(size=8)),
        batch=batch,
        accumulation=accumulation,
        rank=rank,
        world=world,
        seed=seed,
        clock=Clock(100, batch, TOTAL),
    )


def take(stream: TrainStream, micros: int, since: int = 0) -> list[Batch]:
    return list(islice(stream.batches(since), micros))


def by_position(batches: list[Batch]) -> dict[int, list[torch.Tensor]]:
    return {
        position: [view[slot] for view in batch.views]
        for batch in batches
        for slot, position in enumerate(batch.positions.tolist())
    }


def same_tensors(ours: dict[int, list[torch.Tensor]], theirs: dict[int, list[torch.Tensor]]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(a, b) for position in ours for a, b in zip(ours[position], theirs[position], strict=True)
    )


def test_a_batch_holds_what_it_says(folder):
    for batch in take(stream(folder), 6):
        numbers = number_of(batch.views[0].numpy())
        assert batch.keys == [key_of(number) for number in numbers]
        assert batch.labels.tolist() == [number % 10 for number in numbers]
        assert batch.weights.tolist() == [1.0] * 24
        assert batch.views[0].shape == (24, 3, 8, 8)
        assert batch.views[0].is_contiguous()
        assert (batch.views[0].dtype, batch.labels.dtype, batch.positions.dtype) == (
            torch.uint8,
            torch.int64,
            torch.int64,
        )
        assert not batch.faults


def test_each_epoch_serves_each_sample_once(folder):
    keys = [key for batch in take(stream(folder), 97) for key in batch.keys]  # 24 epochs
    for epoch in range(24):
        assert len(set(keys[epoch * TOTAL : (epoch + 1) * TOTAL])) == TOTAL
    assert keys[:TOTAL] != keys[TOTAL : 2 * TOTAL]


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_holds_the_same_samples_for_any_number_of_ranks(folder, world, accumulation):
    """And so does each micro-batch, which a contrastive loss looks across."""
    micros = 10 * accumulation
    alone = [sorted(b.keys) for b in take(stream(folder, batch=72, accumulation=accumulation), micros)]
    ranks = [
        take(stream(folder, batch=72, accumulation=accumulation, rank=rank, world=world), micros)
        for rank in range(world)
    ]
    for number, expected in enumerate(alone):
        parts = [ranks[rank][number] for rank in range(world)]
        assert {len(part) for part in parts} == {72 // world // accumulation}
        assert sorted(key for part in parts for key in part.keys) == expected
        assert {part.step for part in parts} == {number // accumulation}


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_neither_pixels_nor_sequence(folder, workers):
    augment = CropFlip(CropFlip.Config(size=12))
    inline = take(stream(folder, augment, accumulation=2), 13)
    forked = take(stream(folder, augment, accumulation=2, workers=workers, prefetch=3), 13)
    for ours, theirs in zip(inline, forked, strict=True):
        assert (ours.keys, ours.step) == (theirs.keys, theirs.step)
        assert torch.equal(ours.positions, theirs.positions)
        assert torch.equal(ours.views[0], theirs.views[0])
        assert torch.equal(ours.ids, theirs.ids)


def test_ranks_and_batch_do_not_change_pixels(folder):
    augment = SimCLR(SimCLR.Config(size=8))
    alone = by_position(take(stream(folder, augment, batch=24), 3))
    spread = {}
    for rank in range(3):
        spread |= by_position(take(stream(folder, augment, batch=12, rank=rank, world=3), 6))
    assert same_tensors(alone, spread)
    views = alone[0]
    assert not torch.equal(views[0], views[1])
    other_seed = by_position(take(stream(folder, augment, seed=1), 3))
    assert not same_tensors(alone, other_seed)


def test_a_resumed_run_continues_whatever_was_prefetched(folder):
    """Worker 3 of a fresh start is at another micro-batch than worker 3 of a resume; the sequence must not show it."""
    whole = take(stream(folder, workers=3, prefetch=8), 12)
    for done in (1, 4, 5):
        resumed = take(stream(folder, workers=3, prefetch=8), 12 - done, since=done * 24)
        assert [batch.keys for batch in resumed] == [batch.keys for batch in whole[done:]]
        assert [batch.step for batch in resumed] == [batch.step for batch in whole[done:]]


def test_chains_of_restarts_with_other_ranks_workers_and_batches(folder):
    draw, position, keys = random.Random(0), 0, []
    for batch, accumulation, world, workers in [
        (48, 1, 8, 0),
        (30, 5, 2, 2),
        (50, 1, 5, 0),
        (7, 1, 1, 3),
        (96, 2, 4, 1),
    ]:
        steps = draw.randint(1, 4)
        for rank in range(world):
            part = stream(folder, batch=batch, accumulation=accumulation, rank=rank, world=world, workers=workers)
            keys += [key for b in take(part, steps * accumulation, position) for key in b.keys]
        position += steps * batch
    reference = [key for b in take(stream(folder, batch=1), position) for key in b.keys]
    assert Counter(keys) == Counter(reference)


def test_one_shard_for_eight_ranks_of_four_workers(tmp_path):
    folder = write_set(tmp_path, [40]).root
    keys = [
        key
        for rank in range(8)
        for batch in take(stream(folder, batch=40, rank=rank, world=8, workers=4), 1)
        for key in batch.keys
    ]
    assert sorted(keys) == [key_of(number) for number in range(40)]


@pytest.mark.parametrize("total", [1, 3])
def test_fewer_samples_than_ranks(tmp_path, total):
    folder = write_set(tmp_path, [total]).root
    keys = [key for r in range(4) for b in take(stream(folder, batch=12, rank=r, world=4), 2) for key in b.keys]
    assert set(Counter(keys).values()) == {24 // total}


def test_a_batch_that_cannot_be_split_is_refused_with_the_nearest(folder):
    with pytest.raises(InputError, match=r"multiple of 15, such as 15 or 30"):
        stream(folder, batch=24, world=5, accumulation=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_new_size_starts_at_its_step_on_every_rank(folder, workers):
    augment = CropFlip(CropFlip.Config(size=Step(start=8, milestones=["3 steps", "5 steps"], values=[12.9, 17])))
    for rank in range(2):
        part = stream(folder, augment, accumulation=2, rank=rank, world=2, workers=workers, prefetch=6)
        part.size_multiple = 4
        sizes = [(batch.step, batch.views[0].shape[-1]) for batch in take(part, 14)]
        expected = [8, 8, 8, 12, 12, 16, 16]
        assert sizes == [(step, size) for step, size in enumerate(expected) for _ in range(2)]


def test_damaged_samples_are_slots_of_weight_zero(tmp_path):
    def content(number: int) -> bytes:
        return pickle.dumps({"code": 1}) if number == 50 else png(pixels_of(number))

    manifest = write_set(tmp_path, SIZES, content=content)
    whole = by_position(take(stream(tmp_path, batch=97), 1))
    bad = {damage(manifest, number) for number in (0, 22, 96)} | {key_of(50)}
    for workers in (0, 2):
        (batch,) = take(stream(tmp_path, batch=97, workers=workers), 1)
        assert len(set(batch.keys)) == 97
        assert {key for key, weight in zip(batch.keys, batch.weights.tolist(), strict=True) if weight == 0} == bad
        assert batch.weights.sum() == 93
        assert {fault["key"] for fault in batch.faults} == bad
        for fault in batch.faults:
            slot = batch.positions.tolist().index(fault["position"])
            assert batch.keys[slot] == fault["key"]
            assert not batch.views[0][slot].any()
            assert fault["shard"].endswith(".tar")
        for slot, position in enumerate(batch.positions.tolist()):
            if batch.weights[slot]:
                assert torch.equal(batch.views[0][slot], whole[position][0])


def test_a_micro_batch_with_nothing_readable_keeps_its_shape(tmp_path):
    write_set(tmp_path, [4], content=lambda number: b"no image")
    (batch,) = take(stream(tmp_path, SimCLR(SimCLR.Config(size=16)), batch=4), 1)
    assert [tuple(view.shape) for view in batch.views] == [(4, 3, 16, 16)] * 2
    assert batch.weights.sum() == 0
    assert len(batch.faults) == 4


def test_greyscale(folder):
    (batch,) = take(stream(folder, CropFlip(CropFlip.Config(size=12)), channels=1), 1)
    assert batch.views[0].shape == (24, 1, 12, 12)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_training_generators_do_not_notice(folder, workers):
    def draws() -> tuple:
        return torch.rand(3).tolist(), random.random(), np.random.rand()

    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = draws()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    take(stream(folder, CropFlip(CropFlip.Config(size=8)), workers=workers), 2)
    assert draws() == expected


def test_the_cache_changes_nothing(folder):
    augment = CropFlip(CropFlip.Config(size=8))
    plain, cached = (by_position(take(stream(folder, augment, cache=c, workers=2), 12)) for c in ("none", "ram"))
    assert same_tensors(plain, cached)


def test_a_checkpoint_of_other_data_is_refused(folder, tmp_path):
    saved = stream(folder).identity
    stream(folder, batch=48, world=2, rank=1, workers=1).check_identity(saved)
    other = write_set(tmp_path, [5, 5]).root
    with pytest.raises(InputError, match=r"another one.*97 in the checkpoint, 10 now"):
        stream(other).check_identity(saved)
    with pytest.raises(InputError, match="the seed differs"):
        stream(folder, seed=1).check_identity(saved)
    with pytest.raises(InputError, match=r"data\.lanes differs"):
        stream(folder, lanes=8).check_identity(saved)


def test_workers_outlive_the_signals_of_the_loop(folder):
    others = set(multiprocessing.active_children())
    batches = stream(folder, workers=1, prefetch=1).batches(0)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(worker.pid, number)
    for _ in range(5):
        next(batches)
    assert worker.is_alive()
    del batches
    worker.join(10)
    assert not worker.is_alive()


@pytest.mark.parametrize("how", ["process", "program"])
def test_a_rank_that_ends_amid_its_stream_does_not_wait_for_its_workers(folder, how):
    """Workers ignore SIGTERM, with which Python stops the children that are left at exit."""
    program = (
        f"from tests.unit.test_train_stream import *\nbatches = stream(Path({str(folder)!r}), workers=2).batches(0)\n"
        "next(batches)\nraise SystemExit(75)"
    )
    if how == "program":
        assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 75
        return
    process = multiprocessing.get_context("fork").Process(target=exec, args=(program, {}))
    process.start()
    process.join(30)
    assert process.exitcode == 75


def test_workers_die_with_a_killed_rank():
    def ask(pipe) -> None:
        _start_worker(mmap.mmap(-1, 1), 0)
        asked = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(asked))  # PR_GET_PDEATHSIG
        pipe.send(asked.value)

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=ask, args=(theirs,))
    process.start()
    assert ours.poll(30)
    assert ours.recv() == signal.SIGKILL
    process.join()
