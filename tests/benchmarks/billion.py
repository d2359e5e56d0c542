"""How a run starts on a billion samples: time and memory from the manifest to the first batch.

    python -m tests.benchmarks.billion [--shards 100000] [--workers 2]

The set is simulated: every shard is a link to one and the same tar of 10,000 tiny images. Everything that reads it is
real. Times are of a warm file system; memory is what the process has grown by since its imports, at its highest, and
what each worker has of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks._report import print_facts
from tests.shards import write_set

EACH = 10_000  # samples of a shard
START = """
import json, sys, time
from penstock.augment.crop_flip import CropFlip
from penstock.schedule import Clock
from penstock.streams.data import Data
from penstock.streams.train import TrainStream
import psutil

folder, workers, since = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def highest():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

before, began = highest(), time.perf_counter()
config = Data.Config(train=folder, workers=workers)
data = Data(config)
loaded = time.perf_counter()
stream = TrainStream(config, CropFlip(CropFlip.Config(size=8)), batch=256, accumulation=1, rank=0, world=1, seed=0,
                     clock=Clock(10, 256, data.part.samples))
batch = next(batches := stream.batches(since))
ended = time.perf_counter()
children = psutil.Process().children()
own = [child.memory_full_info().uss for child in children]
print(json.dumps({
    "samples": stream.samples_per_epoch, "load": loaded - began, "seconds": ended - began, "grown": highest() - before,
    "workers": own, "weights": float(batch.weights.sum()), "shards": len(set(batch.keys)),
}))
"""


def simulate(folder: Path, shards: int) -> None:
    """A set of `shards` shards of 10,000 samples, which takes the room of one and its links."""
    one = write_set(folder / "one", [EACH])
    (shard,) = one.shards
    listed = []
    for number in range(shards):
        name = f"shard-{number:06d}"
        (folder / f"{name}.tar").symlink_to(f"one/{shard.name}")
        (folder / f"{name}.index.npy").symlink_to(f"one/{shard.index}")
        listed.append({"name": f"{name}.tar", "index": f"{name}.index.npy", "bytes": shard.bytes, "samples": EACH,
                       "sha256": shard.sha256, "index_sha256": shard.index_sha256})  # fmt: skip
    write_manifest(folder, listed, {label: count * shards for label, count in one.class_counts.items()})


def write_manifest(folder: Path, shards: list[dict[str, Any]], counts: dict[int, int]) -> None:
    from tests.fuzz import identity_of

    samples = sum(shard["samples"] for shard in shards)
    content: dict[str, Any] = {"version": 1, "samples": samples, "classes": None, "digest_of_ids": f"{0:016x}"}
    content |= {"class_counts": {str(label): count for label, count in counts.items()}, "shards": shards, "pack": {}}
    content["identity"] = identity_of(content)
    (folder / "manifest.json").write_text(json.dumps(content, indent=1))


def started(folder: Path, workers: int, since: int) -> dict[str, Any]:
    """What a fresh process says of its start at a position."""
    command = [sys.executable, "-c", START, str(folder), str(workers), str(since)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    print_facts()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        simulate(Path(folder), args.shards)
        size = (Path(folder) / "manifest.json").stat().st_size
        for since in (0, args.shards * EACH * 6 // 10):
            found = started(Path(folder), args.workers, since)
            own = ", ".join(f"{each / 1e6:.0f}" for each in found["workers"])
            total = (found["grown"] + sum(found["workers"])) / 1e6
            print(
                f"{found['samples']:,} samples in {args.shards:,} shards (manifest of {size / 1e6:.0f} MB), from "
                f"position {since:,}: manifest loaded in {found['load']:.2f} s, first batch of {found['weights']:.0f} "
                f"after {found['seconds']:.2f} s; {found['grown'] / 1e6:.0f} MB here, {own} MB in the workers, "
                f"{total:.0f} MB in all"
            )


if __name__ == "__main__":
    main()
