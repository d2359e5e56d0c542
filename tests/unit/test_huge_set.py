"""Start and resume do not grow with the data. `python -m tests.benchmarks.billion` times the whole of it."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from penstock.errors import InputError
from penstock.streams.images import Images
from penstock.streams.sets.manifest import Manifest, Shard
from penstock.streams.sets.storage import LocalFile, LocalStorage
from tests.benchmarks.billion import write_manifest
from tests.fuzz import identity_of
from tests.shards import write_set
from tests.unit.test_train_stream import stream

LOCATE = """
import resource, sys
import numpy as np
from penstock.streams.sets.manifest import Manifest
from penstock.streams.positions.order import Order

def highest():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

manifest = None
before = highest()
manifest = Manifest.load(sys.argv[1])
order = Order([shard.samples for shard in manifest.shards], 0)
positions = np.arange(600_000_000, 600_000_256)
shards, samples = order.locate(positions)
print(manifest.samples, len(set(zip(shards.tolist(), samples.tolist()))), highest() - before)
"""


def listed(number: int) -> dict:
    names = {"name": f"shard-{number:06d}.tar", "index": f"shard-{number:06d}.index.npy"}
    return names | {
        "bytes": 20_000_000,
        "samples": 10_000,
        "sha256": f"{number:064x}",
        "index_sha256": f"{number:064x}",
    }


def test_a_billion_samples_take_little_memory(tmp_path):
    write_manifest(tmp_path, [listed(number) for number in range(100_000)], {0: 10**9})
    done = subprocess.run([sys.executable, "-c", LOCATE, str(tmp_path)], capture_output=True, text=True, check=True)
    samples, places, grown = done.stdout.split()
    assert (samples, places) == ("1000000000", "256")
    assert float(grown) < 200  # MB


def test_the_identity_is_that_of_the_whole_text(tmp_path):
    """It is computed in parts; here against one text, with a class name that looks like the seam."""
    for count in (0, 1, 999, 1000, 1001, 2500):
        shards = tuple(Shard(**listed(number)) for number in range(count))
        manifest = Manifest(shards, count * 10_000, ('"shards":[]', "é"), {0: count}, 1 << 63)
        manifest.save(tmp_path)
        written = json.loads((tmp_path / "manifest.json").read_text())
        assert written["identity"] == manifest.identity == identity_of(written)


def test_a_set_is_parsed_once_and_anew_when_it_changed(tmp_path, monkeypatch):
    write_set(tmp_path, [5, 4])
    first = Manifest.load(tmp_path)
    assert Manifest.load(tmp_path) is first
    assert Manifest.load(str(tmp_path)) is first
    write_set(tmp_path, [5, 5])
    assert Manifest.load(tmp_path).samples == 10
    assert Manifest.load(tmp_path) is not first


def test_of_many_files_some_of_every_part_are_looked_at(tmp_path, monkeypatch):
    write_set(tmp_path, [1] * 20)
    manifest, asked = Manifest.load(tmp_path), []
    sizes = LocalStorage.sizes

    def counting(self, names):
        names = list(names)
        asked.extend(names)
        return sizes(self, names)

    monkeypatch.setattr(LocalStorage, "sizes", counting)
    manifest.check_files()
    assert len(asked) == 40
    asked.clear()
    monkeypatch.setattr(LocalStorage, "shards_looked_at", 8)
    manifest.check_files()
    assert asked[::2] == [shard.name for shard in manifest.shards[::3]]
    (tmp_path / manifest.shards[1].name).unlink()
    images = Images(manifest)  # not looked at, and so found when it is opened
    assert images.load(0, 0).image is not None
    with pytest.raises(InputError, match="shard-000001"):
        images.load(1, 0)


@pytest.mark.parametrize("since", [0, 37, 137])
def test_a_start_amid_an_epoch_reads_only_what_it_serves(tmp_path, monkeypatch, since):
    manifest = write_set(tmp_path, [20] * 6)
    reads: list[tuple[str, int, int]] = []
    opened: list[str] = []
    names: dict[int, str] = {}
    open_file, read, local = LocalStorage.open, LocalFile.read, LocalStorage.local

    def opening(self, name, *rest):
        file = open_file(self, name, *rest)
        names[id(file)] = name
        return file

    def reading(self, offset, size, *rest):
        reads.append((names[id(self)], offset, size))
        return read(self, offset, size, *rest)

    def looking(self, name, *rest):
        opened.append(name)
        return local(self, name, *rest)

    monkeypatch.setattr(LocalStorage, "open", opening)
    monkeypatch.setattr(LocalStorage, "local", looking)
    monkeypatch.setattr(LocalFile, "read", reading)
    served = stream(tmp_path, batch=5, block=4)
    assert reads == opened == []
    batches = list(islice(served.batches(since), 2))
    indices = {shard.name: np.load(tmp_path / shard.index) for shard in manifest.shards}
    places = {
        key: (name, int(row["offset"]), int(row["size"]))
        for name, index in indices.items()
        for row in index
        for key in [row["key"].decode()]
    }
    assert sorted(reads) == sorted(places[key] for batch in batches for key in batch.keys)
    assert {name.replace(".index.npy", ".tar") for name in opened} == {name for name, _, _ in reads}
    assert len(opened) == len(set(opened))


def test_shards_are_not_kept_by_readers_that_are_gone(tmp_path):
    """Descriptors go with the stream that opened them."""
    write_set(tmp_path, [4] * 10)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        batches = stream(tmp_path, batch=40).batches(0)
        next(batches)
        del batches
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
