"""The cache on disk by itself: what leaves it, what is shared, and what a full disk or a killed process leaves."""

import errno
import fcntl
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from penstock.errors import InputError
from penstock.streams.sets.remote.cache import Cache, path_of


def content(size: int, value: int = 1):
    return lambda file: file.write(bytes([value]) * size)


def test_the_cache_lets_go_of_what_was_not_used_for_longest(tmp_path):
    cache = Cache(tmp_path, 1000)
    for number in range(3):
        path = cache.get(f"{number}" * 64, 300, content(300, number))
        assert path is not None
        os.utime(path, (number, number))
    os.utime(path_of(tmp_path, "0" * 64), (9, 9))  # used again
    assert cache.get("3" * 64, 300, content(300)) is not None
    left = [number for number in range(4) if path_of(tmp_path, f"{number}" * 64).is_file()]
    assert 0 in left and 3 in left and 1 not in left
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*")) <= 1000


def test_what_is_open_can_be_read_on_after_it_left_the_cache(tmp_path):
    cache = Cache(tmp_path, 1000)
    path = cache.get("a" * 64, 600, content(600, 7))
    with path.open("rb") as file:
        assert cache.get("b" * 64, 600, content(600)) is not None
        assert not path.exists()
        assert file.read() == bytes([7]) * 600


def test_what_cannot_fit_is_not_kept_and_said_once(tmp_path, capsys):
    cache = Cache(tmp_path, 1000)
    assert cache.get("a" * 64, 2000, content(2000)) is None
    assert cache.get("b" * 64, 2000, content(2000)) is None
    assert capsys.readouterr().err.count("no room") == 1
    assert not list(tmp_path.glob("*/*"))


def test_a_full_disk_is_said_and_reading_goes_on(tmp_path, capsys):
    cache = Cache(tmp_path, 1000)

    def full(_):
        raise OSError(28, "No space left on device")

    assert cache.get("a" * 64, 100, full) is None
    assert "No space left on device" in capsys.readouterr().err
    assert cache.get("b" * 64, 100, content(100)) is not None
    assert cache._used() == 100


def test_a_fetch_that_fails_leaves_nothing(tmp_path):
    cache = Cache(tmp_path, 1000)

    def broken(file):
        file.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cache.get("a" * 64, 100, broken)
    assert not list(tmp_path.glob("*/*")) and cache._used() == 0


def test_a_file_of_another_size_is_fetched_anew(tmp_path):
    cache = Cache(tmp_path, 1000)
    path = cache.get("a" * 64, 100, content(100))
    path.write_bytes(b"short")
    assert cache.get("a" * 64, 100, content(100, 2)).read_bytes() == bytes([2]) * 100


def test_two_fetch_one_file_and_one_waits(tmp_path):
    cache, calls, barrier = Cache(tmp_path, 10_000), [], threading.Barrier(6)

    def slow(file):
        calls.append(1)
        time.sleep(0.1)
        file.write(b"x" * 100)

    def get(_):
        barrier.wait()
        return cache.get("a" * 64, 100, slow)

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(get, range(6)))) == 1
    assert len(calls) == 1 and cache._used() == 100


def _take_many(folder: Path, seed: int) -> None:
    cache = Cache(folder, 5_000)
    for number in np.random.default_rng(seed).integers(0, 30, 200).tolist():
        path = cache.get(f"{number:064d}", 500, content(500, number))
        with suppress(FileNotFoundError):  # another process needed the room
            assert path.read_bytes() == bytes([number]) * 500


def test_processes_share_a_small_cache_without_a_wrong_byte(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_take_many, args=(tmp_path, seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    kept = [file for file in tmp_path.glob("*/*") if file.suffix != ".part"]
    assert sum(file.stat().st_size for file in kept) <= 5_000
    assert Cache(tmp_path, 5_000)._used() == sum(file.stat().st_size for file in kept)


def test_a_draft_that_a_killed_process_left_is_used_again(tmp_path):
    cache = Cache(tmp_path, 1000)
    draft = path_of(tmp_path, "a" * 64).with_name("a" * 64 + ".part")
    draft.parent.mkdir()
    draft.write_bytes(b"half of it and more" * 20)
    assert cache.get("a" * 64, 100, content(100, 3)).read_bytes() == bytes([3]) * 100
    assert not draft.exists()


def test_a_file_of_unknown_size_that_does_not_fit_is_not_kept(tmp_path, capsys):
    cache = Cache(tmp_path, 1000)
    assert cache.get("a" * 64, None, content(2000)) is None
    assert "no room" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*")) and cache._used() == 0
    assert cache.get("b" * 64, None, content(600)) is not None and cache._used() == 600
    assert cache.get("c" * 64, None, content(600)) is not None and cache._used() == 600


def test_a_file_may_leave_as_soon_as_it_came(tmp_path, monkeypatch):
    cache, replace = Cache(tmp_path, 1000), Path.replace

    def replaced(draft, path):
        replace(draft, path)
        path.unlink()

    monkeypatch.setattr(Path, "replace", replaced)
    assert cache.get("a" * 64, 100, content(100)) is not None


def test_a_draft_leaves_while_its_lock_is_held(tmp_path, monkeypatch):
    cache, unlink, held = Cache(tmp_path, 1000), Path.unlink, []
    draft = path_of(tmp_path, "a" * 64).with_name("a" * 64 + ".part")
    draft.parent.mkdir()
    draft.write_bytes(bytes(900))  # of a process that was killed

    def unlinked(path, missing_ok=False):
        if path == draft:
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    held.append(path)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlinked)
    assert cache.get("b" * 64, 500, content(500)) is not None
    assert held == [draft] and not draft.exists()


def test_a_draft_that_is_anothers_by_now_is_not_taken(tmp_path):
    cache = Cache(tmp_path, 1000)
    draft = path_of(tmp_path, "a" * 64).with_name("a" * 64 + ".part")

    def robbed(file):
        file.write(bytes(100))
        draft.unlink()
        draft.write_bytes(b"half")

    assert cache.get("a" * 64, 100, robbed) is None
    assert draft.read_bytes() == b"half" and not draft.with_suffix("").exists() and cache._used() == 0


def test_a_disk_without_locks_is_refused_with_what_to_set(tmp_path, monkeypatch):
    def without(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.raises(InputError, match=r"No locks available.* local disk .*data\.remote\.cache_dir or \$PENSTOCK_"):
        Cache(tmp_path, 1000)
