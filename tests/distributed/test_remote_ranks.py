"""Ranks and workers that read an object store, through a wire that spoils answers, see what a folder gives."""

import hashlib
import multiprocessing
import os
from itertools import islice

import pytest

from penstock.augment.none import NoAugmentation
from penstock.schedule import Clock
from penstock.streams.data import Data
from penstock.streams.train import TrainStream
from tests.pool import Pool
from tests.remote import end_fetchers, environment, s3, upload
from tests.shards import damage, write_set

SIZES, STEPS, BATCH = [40, 25, 60], 12, 12


@pytest.fixture(scope="module")
def pair():
    """Two ranks that trained nothing before: engines' empty buckets add up to more memory than a fork may promise."""
    pool = Pool(2)
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def wire():
    with s3() as server:
        yield server


def stream(rank: int, world: int, place: str, workers: int, remote: dict) -> TrainStream:
    return TrainStream(
        Data.Config(train=place, workers=workers, lanes=4, block=8, window=64, remote=remote, prefetch=2),
        NoAugmentation(NoAugmentation.Config(size=8)),
        batch=BATCH,
        accumulation=1,
        rank=rank,
        world=world,
        seed=3,
        clock=Clock(100, BATCH, sum(SIZES)),
    )


def batches(rank: int, world: int, place: str, env: dict[str, str], workers: int, remote: dict, since: int = 0):
    """Per micro-batch: everything in it that training sees, as a hash and in words; then the counts of its reading."""
    os.environ.update(env)
    multiprocessing.current_process()._config["daemon"] = False  # ranks of the pool are daemons, without workers
    found, counts = [], {"retries": 0.0, "cache_hits": 0.0, "cache_misses": 0.0}
    iterator = stream(rank, world, place, workers, remote).batches(since * BATCH)
    for batch in islice(iterator, STEPS - since):
        digest = hashlib.sha256()
        for tensor in (*batch.views, batch.labels, batch.weights, batch.positions, batch.ids):
            digest.update(tensor.contiguous().numpy().tobytes())
        found.append((digest.hexdigest(), batch.keys, batch.faults))
        counts = {name: counts[name] + batch.timing.get(name, 0.0) for name in counts}
    del iterator
    end_fetchers()
    return found, counts


@pytest.mark.ranks
@pytest.mark.parametrize("mode", ["shards", "ranges"])
def test_two_ranks_with_two_workers_see_what_a_folder_gives(pair, wire, tmp_path, mode):
    manifest = write_set(tmp_path / "set", SIZES)
    damaged = damage(manifest, 30)
    upload(wire, tmp_path / "set", "bucket", mode)
    local = pair.run(batches, str(tmp_path / "set"), {}, 0, {})
    last = ("500", "shift", "flip") if mode == "ranges" else ("500", "flip")
    wire.spoils.clear()
    for number, kinds in enumerate((("503", "cut", "tag"), ("429", "reset", "whole"), last)):
        for kind in kinds:
            wire.spoil(kind, rf"GET /bucket/{mode}/shard-00000{number}\.tar")
    wire.spoil("cut", rf"GET /bucket/{mode}/shard-000000\.index")
    wire.log.clear()
    remote = {"mode": mode, "retries": 20, "timeout": 2.0}
    env = environment(wire, tmp_path / "cache")
    seen = pair.run(batches, f"s3://bucket/{mode}", env, 2, remote)
    assert [found for found, _ in seen] == [found for found, _ in local]
    assert {fault["key"] for found, _ in seen for _, _, faults in found for fault in faults} == {damaged}
    assert [spoil.kind for spoil in wire.spoils if not spoil.seen] == []
    # Not for a byte that a checksum finds, nor for a range that was ignored; and some come too late to be told.
    assert sum(counts["retries"] for _, counts in seen) >= 4
    if mode == "ranges":
        spans = [span for _, _, span, status in wire.gets(r"shard-000000\.tar") if status == 206 and span]
        assert len(set(spans)) == 5  # blocks of 8
        assert len(spans) <= 5 + 4 + 2  # once for both ranks, but for what was spoiled or is damaged
    wire.spoils.clear()
    wire.log.clear()
    again = pair.run(batches, f"s3://bucket/{mode}", env, 2, remote, since=5)  # a restart, from the cache
    assert [found for found, _ in again] == [found[5:] for found, _ in local]
    fetched = {path.rpartition("/")[2] for method, path, _, _ in wire.log if method == "GET"}
    assert fetched <= {"manifest.json", "shard-000000.tar"}  # the damaged sample is looked at again


@pytest.mark.ranks
def test_one_download_serves_all_ranks_and_workers(pair, wire, tmp_path):
    write_set(tmp_path / "set", SIZES)
    upload(wire, tmp_path / "set", "bucket", "once")
    wire.spoils.clear()
    wire.log.clear()
    pair.run(batches, "s3://bucket/once", environment(wire, tmp_path / "cache"), 2, {"mode": "shards"})
    for number in range(len(SIZES)):
        assert len(wire.gets(rf"once/shard-00000{number}\.tar")) == 1
        assert len(wire.gets(rf"once/shard-00000{number}\.index")) == 1


def leave(rank: int, world: int, place: str, env: dict[str, str], remote: dict) -> str:
    """What a rank is told whose store goes away while it reads."""
    os.environ.update(env)
    multiprocessing.current_process()._config["daemon"] = False
    left = stream(rank, world, place, 1, remote)
    end_fetchers()
    os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"  # nobody listens there
    try:
        list(islice(left.batches(0), 2))
    except Exception as error:
        return str(error)
    finally:
        end_fetchers()
    return ""


@pytest.mark.ranks
def test_a_store_that_is_gone_ends_every_rank_with_one_clear_message(pair, wire, tmp_path):
    write_set(tmp_path / "set", SIZES)
    upload(wire, tmp_path / "set", "bucket", "gone")
    env = environment(wire, tmp_path / "cache")
    for message in pair.run(leave, "s3://bucket/gone", env, {"mode": "ranges", "retries": 1, "timeout": 2.0}):
        assert "s3://bucket/gone cannot be reached" in message
        assert env["AWS_SECRET_ACCESS_KEY"] not in message and env["AWS_ACCESS_KEY_ID"] not in message
