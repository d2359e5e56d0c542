"""Nothing grows while a stream is served, and nothing stays of a rank that was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.shards import write_set

SERVE = """
import json, sys
from pathlib import Path
import psutil
from penstock.augment.simclr import SimCLR
from penstock.schedule import Clock
from penstock.streams.data import Data
from penstock.streams.train import TrainStream

folder, epochs, workers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config = Data.Config(train=folder, workers=workers, lanes=4)
stream = TrainStream(config, SimCLR(SimCLR.Config(size=16)), batch=50, accumulation=1, rank=0, world=1, seed=0,
                     clock=Clock(10**9, 50, 1000))
batches = stream.batches(0)

def held(process):
    shared = [entry.rss for entry in process.memory_maps() if "/dev/shm" in entry.path]
    return {"uss": process.memory_full_info().uss - sum(shared), "descriptors": process.num_fds(),
            "shared": sum(shared)}

for epoch in range(epochs):
    for _ in range(stream.samples_per_epoch // 50):
        next(batches)
    children = sorted(psutil.Process().children(), key=lambda child: child.pid)
    print(json.dumps([held(child) for child in [psutil.Process(), *children]]), flush=True)
"""
SHARED = Path("/dev/shm")
GROWTH = 4e6  # bytes over eight epochs, of a process: none would be best, but allocators keep some


def serving(folder: Path, epochs: int, workers: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SERVE, str(folder), str(epochs), str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def test_ten_epochs_take_no_more_than_two(tmp_path):
    """25 shards of which each epoch opens all, two views of each image, one image in twenty unreadable."""
    write_set(tmp_path, [40] * 25, content=lambda number: b"none" if number % 20 == 7 else small(number))
    output, _ = serving(tmp_path, 10).communicate(timeout=120)
    epochs = [json.loads(line) for line in output.splitlines()]
    assert len(epochs) == 10
    assert all(len(processes) == 3 for processes in epochs)  # the rank and its workers
    for second, last in zip(epochs[1], epochs[9], strict=True):
        assert last["uss"] - second["uss"] < GROWTH, epochs
        assert last["descriptors"] <= second["descriptors"] + 8, epochs  # batches on their way come and go
        assert last["shared"] <= second["shared"] + GROWTH


def small(number: int) -> bytes:
    from tests.shards import pixels_of, png

    return png(pixels_of(number, 24, 24))


@pytest.mark.parametrize("at", ["start", "amid"])
def test_nothing_stays_of_a_rank_that_is_killed(tmp_path, at):
    write_set(tmp_path, [100] * 10, content=small)
    before = set(SHARED.iterdir())
    rank = serving(tmp_path, 10_000)
    assert rank.stdout is not None
    process, workers = psutil.Process(rank.pid), []
    if at == "amid":
        rank.stdout.readline()
        workers = process.children(recursive=True)
    while not workers:
        assert rank.poll() is None
        workers = process.children(recursive=True)
        time.sleep(0.01)
    rank.send_signal(signal.SIGKILL)
    rank.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "workers outlive their rank"
    until = time.monotonic() + 10
    mine = {f"_{one.pid}_" for one in [process, *workers]}  # torch names its files torch_PID_...
    while left := [path for path in set(SHARED.iterdir()) - before if any(pid in path.name for pid in mine)]:
        assert time.monotonic() < until, f"left in /dev/shm: {left}"
        time.sleep(0.05)
