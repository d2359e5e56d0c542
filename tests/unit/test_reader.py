"""Reading from shards: exact bytes, and nothing damaged passes."""

import multiprocessing
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from penstock.errors import InputError
from penstock.streams import reader as reader_module
from penstock.streams.images import Images
from penstock.streams.reader import Fault, ShardReader
from penstock.streams.sets.manifest import Manifest
from tests.shards import damage, key_of, number_of, pixels_of, png, write_set

SIZES = [7, 1, 12]


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    return write_set(tmp_path / "set", SIZES)


def places() -> list[tuple[int, int]]:
    return [(shard, sample) for shard, size in enumerate(SIZES) for sample in range(size)]


def test_reads_what_was_packed(manifest):
    reader = ShardReader(manifest)
    for number, place in enumerate(places()):
        data, label, key, identity = reader.read(*place)
        assert (data, label, key) == (png(pixels_of(number)), number % 10, key_of(number))
        assert identity == int(np.load(manifest.root / manifest.shards[place[0]].index)["id"][place[1]])


def _read_all(manifest: Manifest, reader: ShardReader, results) -> None:
    order = np.random.default_rng().permutation(len(places()) * 20) % len(places())
    results.put([reader.read(*places()[number])[2] == key_of(number) for number in order])


def test_forked_readers_do_not_disturb_each_other(manifest):
    reader = ShardReader(manifest)
    reader.read(0, 0)  # open before the fork, so the descriptors are shared
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_read_all, args=(manifest, reader, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert all(all(results.get(timeout=30)) for _ in processes)
    for process in processes:
        process.join()


def test_few_files_stay_open(manifest, monkeypatch):
    monkeypatch.setattr(reader_module, "OPEN_SHARDS", 2)
    reader = ShardReader(manifest)
    for place in [(0, 0), (1, 0), (2, 3), (0, 1), (2, 11)]:
        reader.read(*place)
        assert len(reader._open) <= 2
    reader.close()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def few_descriptors(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def _read_two_sets(folders: list[Path], results) -> None:
    few_descriptors(4 * descriptors() + 64)
    readers = [ShardReader(Manifest.load(folder)) for folder in folders]
    keys = [reader.record(shard, 0).key for shard in [*range(90), *range(90)] for reader in readers]
    right = keys == [key_of(shard) for shard in [*range(90), *range(90)] for _ in readers]
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    results.put((right, sum(len(reader._open) for reader in readers), limit))


def _read_without_descriptors(folder: Path, results) -> None:
    reader = ShardReader(Manifest.load(folder))
    lowest = os.dup(0)  # the limit is on their numbers, and tests before may have left gaps
    os.close(lowest)
    few_descriptors(lowest)
    try:
        reader.record(0, 0)
    except InputError as error:
        results.put(str(error))


def in_a_process(run, *args):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=run, args=(*args, results))
    process.start()
    found = results.get(timeout=30)
    process.join()
    return found


def test_two_readers_share_a_low_limit_of_open_files(tmp_path):
    folders = [write_set(tmp_path / name, [1] * 90).root for name in ("one", "two")]
    right, opened, limit = in_a_process(_read_two_sets, folders)
    assert right
    assert 2 <= opened <= limit * 3 // 8  # two descriptors each


def test_too_few_descriptors_are_not_taken_for_damage(manifest):
    said = in_a_process(_read_without_descriptors, manifest.root)
    assert "ulimit -n" in said
    assert "pack the set again" not in said


def test_files_close_with_their_reader(manifest):
    before = descriptors()
    reader = ShardReader(manifest)
    reader.record(0, 0)
    assert descriptors() == before + 2
    del reader
    assert descriptors() == before


def test_every_flipped_byte_of_a_payload_is_a_fault(manifest):
    reader = ShardReader(manifest)
    record = reader.record(1, 0)
    path = manifest.root / manifest.shards[1].name
    whole = path.read_bytes()
    for place in range(record.offset, record.offset + record.size):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(Fault, match="CRC"):
            ShardReader(manifest).read(1, 0)


def test_a_shard_that_is_cut_while_open_is_a_fault(manifest):
    reader = ShardReader(manifest)
    reader.read(2, 0)
    path = manifest.root / manifest.shards[2].name
    with path.open("r+b") as tar:
        tar.truncate(path.stat().st_size // 2)
    with pytest.raises(Fault, match="ends early"):
        reader.read(2, 11)


@pytest.mark.parametrize("change", ["cut in half", "missing", "no index"])
def test_a_set_unlike_its_manifest_is_refused_at_once(manifest, change):
    shard = manifest.root / manifest.shards[1].name
    if change == "cut in half":
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    elif change == "missing":
        shard.unlink()
    else:
        (manifest.root / manifest.shards[1].index).unlink()
    with pytest.raises(InputError, match="shard-000001"):
        Images(manifest)


@pytest.mark.parametrize("how", ["a label changed", "of another shard", "a pickle"])
def test_a_changed_index_is_refused(manifest, how):
    path = manifest.root / manifest.shards[0].index
    if how == "a label changed":
        index = np.load(path)
        index["label"][3] += 1
        np.save(path, index)
    elif how == "of another shard":
        shutil.copy(manifest.root / manifest.shards[2].index, path)
    else:
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"shard-000000.index.npy"):
        ShardReader(manifest).record(0, 3)


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_images_and_faults(manifest, cache):
    key = damage(manifest, 9)
    images = Images(manifest, cache=cache)
    for _ in range(2):
        for number, place in enumerate(places()):
            sample = images.load(*place)
            assert (sample.key, sample.label) == (key_of(number), number % 10)
            if number == 9:
                assert sample.image is None
                assert sample.key == key
                assert "CRC" in sample.reason
            else:
                assert np.array_equal(sample.image, pixels_of(number))


def test_the_cache_is_shared_by_forks_and_keeps_odd_sizes_out(tmp_path):
    def content(number: int) -> bytes:
        return png(pixels_of(number, 8, 8) if number != 3 else pixels_of(number, 5, 9))

    manifest = write_set(tmp_path, [6], content=content)  # the index claims 8 x 8 for all
    images = Images(manifest, cache="ram")
    assert images._cache is not None

    def fill() -> None:
        for number in range(6):
            assert images.load(0, number).image is not None

    process = multiprocessing.get_context("fork").Process(target=fill)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert images._cache.filled.tolist() == [1, 1, 1, 0, 1, 1]
    (manifest.root / manifest.shards[0].name).write_bytes(b"x" * manifest.shards[0].bytes)
    assert [number_of(images.load(0, n).image.transpose(2, 0, 1)) for n in (0, 1, 2, 4, 5)] == [0, 1, 2, 4, 5]
    assert images.load(0, 3).image is None


def test_a_cache_larger_than_memory_is_refused(tmp_path):
    manifest = write_set(tmp_path, [2], size=(10_000_000, 10_000))
    with pytest.raises(InputError, match=r"data.cache=none"):
        Images(manifest, cache="ram")


def test_the_caches_of_all_ranks_of_a_machine_must_fit(tmp_path, monkeypatch):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    manifest = write_set(tmp_path, [1], size=(1000, memory // 3000 // 4))  # a quarter of the memory
    Images(manifest, cache="ram")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(InputError, match=r"for each of 4 ranks.*data\.cache=none"):
        Images(manifest, cache="ram")
