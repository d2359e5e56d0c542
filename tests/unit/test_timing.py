"""What is told of each step about its data: times, bytes, and the unreadable by what was wrong."""

from itertools import islice

import numpy as np
import torch

from penstock.meters import Meters
from penstock.streams.faults import FaultLog
from penstock.streams.timing import NAMES
from penstock.task import StepOutput
from tests.shards import damage, write_set
from tests.unit.test_train_stream import stream


def test_a_batch_says_what_it_took(tmp_path):
    manifest = write_set(tmp_path, [9, 11])
    sizes = np.concatenate([np.load(tmp_path / shard.index)["size"] for shard in manifest.shards])
    for workers in (0, 2):
        batches = list(islice(stream(tmp_path, batch=10, workers=workers).batches(0), 4))
        assert all(set(batch.timing) <= set(NAMES) and batch.timing["samples"] == 10 for batch in batches)
        assert sum(batch.timing["bytes"] for batch in batches) == 2 * sizes.sum()  # two epochs
        assert all(0 < batch.timing[f"{name}_seconds"] < 5 for batch in batches for name in ("read", "decode"))
    moved = batches[0].to(torch.device("cpu"))
    assert moved.timing == batches[0].timing


def test_what_is_decoded_once_is_read_once(tmp_path):
    write_set(tmp_path, [12])
    first, second = islice(stream(tmp_path, batch=12, cache="ram").batches(0), 2)
    assert first.timing["bytes"] > 0
    assert second.timing["bytes"] == second.timing["decode_seconds"] == 0


def test_meters_give_means_per_image_and_start_anew(tmp_path):
    write_set(tmp_path, [12])
    (batch,) = islice(stream(tmp_path, batch=12).batches(0), 1)
    taken = dict.fromkeys(NAMES, 0.0) | {"samples": 12, "read_seconds": 0.024, "bytes": 5e6, "retries": 3}
    taken |= {"cache_hits": 3, "cache_misses": 1, "fetched_bytes": 2.5e6}
    batch.timing.clear()
    batch.timing.update(taken)
    meters = Meters()
    for _ in range(2):
        meters.output(StepOutput(torch.tensor(1.0), torch.tensor(12.0)))
        meters.made(batch)
        meters.step(True, 12, waited=0.0)
    _, speed = meters.report()
    assert np.isclose(speed["perf/read_ms"], 2.0)
    assert (speed["perf/retries"], speed["perf/cache_hits"]) == (6, 0.75)
    assert np.isclose(speed["perf/read_mb_per_second"], 2 * speed["perf/fetched_mb_per_second"])
    meters.step(True, 12, waited=0.0)
    assert "perf/read_ms" not in meters.report()[1]


def test_the_unreadable_are_counted_by_what_was_wrong(tmp_path):
    def content(number: int) -> bytes:
        return b"no image" if number == 3 else noise.tobytes()

    noise = np.frombuffer(b"\x89PNG\r\n\x1a\n" + bytes(64), dtype=np.uint8)
    manifest = write_set(tmp_path, [8], content=content)
    damage(manifest, 5)
    (batch,) = islice(stream(tmp_path, batch=8).batches(0), 1)
    assert len(batch.faults) == 8
    log = FaultLog(tmp_path, max_bad=1.0)
    log.add(batch)
    assert log.check() == 8
    assert {kind: count for kind, count in log.kinds.items() if count} == {"changed": 1, "undecodable": 7}
    assert all(key in batch.faults[0] for key in ("position", "shard", "key", "kind", "reason"))
