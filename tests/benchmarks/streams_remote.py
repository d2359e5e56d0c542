"""Reading a set from an object store on loopback against reading it from a folder.

python -m tests.benchmarks.streams_remote DATA       DATA: a folder of images, or a packed set

moto's S3 answers from a thread of this process, in Python and without a real network, so the cold figure is that of the
server more than of the reader; the warm one is what every later epoch costs.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from penstock.streams.positions.order import Order
from penstock.streams.reader import ShardReader
from penstock.streams.sets.manifest import MANIFEST, Manifest
from penstock.streams.sets.pack import Request, pack
from penstock.streams.sets.remote.options import Remote
from penstock.streams.sets.sources import Options, open_source

WORKERS = 2


def _read(place: Path | str, remote: Remote | None, worker: int, samples: int, results: Any) -> None:
    """Read a worker's share of the training order, asking for it beforehand as the loader does."""
    manifest = Manifest.load(place, remote)
    reader, order = ShardReader(manifest), Order([shard.samples for shard in manifest.shards], 0)

    shards, numbers = order.locate(np.arange(worker, samples, WORKERS))
    places = list(zip(shards.tolist(), numbers.tolist(), strict=True))
    began, size = time.perf_counter(), 0
    for first in range(0, len(places), 64):
        reader.prepare(places[first + 128 : first + 192] if first else places[:192])
        size += sum(len(reader.read(*each)[0]) for each in islice(places, first, first + 64))
    results.put((began, time.perf_counter(), size, reader.counters))


def rate(place: Path | str, remote: Remote | None, samples: int) -> float:
    """Images per second that `WORKERS` processes read, checksums included, decoding not."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_read, args=(place, remote, n, samples, results)) for n in range(WORKERS)]
    for worker in workers:
        worker.start()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    return samples / (max(end for _, end, _, _ in found) - min(begin for begin, _, _, _ in found))


def compare(folder: Path, repeats: int = 3) -> dict[str, float]:
    """Images per second from a folder, and from S3 on loopback by blocks and by shards, cold and warm."""
    from tests.remote import environment, s3, upload

    samples = Manifest.load(folder).samples
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch, s3() as wire:
        os.environ.update(environment(wire, Path(scratch, "cache")))
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{wire.upstream}"  # nothing between
        upload(wire, folder, "bucket", "set")
        for turn in range(repeats):
            found.setdefault("folder", []).append(rate(folder, None, samples))
            for mode in ("ranges", "shards"):
                remote = Remote(mode=mode, cache_dir=Path(scratch, f"{mode}{turn}"))
                for state in ("cold", "warm"):
                    found.setdefault(f"{mode} {state}", []).append(rate("s3://bucket/set", remote, samples))
    return {name: statistics.median(rates) for name, rates in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data
        if not (folder / MANIFEST).is_file():
            folder = Path(scratch, "packed")
            pack(open_source(str(args.data), Options()), str(args.data), folder, Request(shard_bytes=8 << 20), WORKERS)
        found = compare(folder)
    for name, images in found.items():
        print(f"{name:12}  {images:8,.0f} images/s   {images / found['folder']:.2f} of the folder's")


if __name__ == "__main__":
    main()
