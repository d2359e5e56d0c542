"""What a reader of a store trusts, and what may leave its cache meanwhile."""

import json
import multiprocessing
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from penstock.errors import InputError
from penstock.streams.reader import ShardReader
from penstock.streams.sets.index import load_records
from penstock.streams.sets.manifest import Manifest
from penstock.streams.sets.remote import link, upload
from penstock.streams.sets.remote.fetcher import Fetcher
from penstock.streams.sets.remote.options import Remote
from penstock.streams.sets.storage import open_storage
from tests.remote import Wire, end_fetchers
from tests.shards import write_set


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A web server for the set at /data, and a cache of its own."""
    write_set(tmp_path / "data", [12, 5])
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    wire = Wire(folder=tmp_path)
    yield wire
    end_fetchers()
    wire.close()


def opened(web: Wire, **options):
    return open_storage(f"{web.url}/data", Remote(**{"retries": 2, "timeout": 2.0} | options))


@pytest.mark.parametrize("outside", ["absolute", "../../victim", "../victim"])
@pytest.mark.parametrize("answers", [True, False])
def test_a_note_names_no_file_elsewhere(web, tmp_path, monkeypatch, outside, answers):
    copies = tmp_path / "copies/inner"
    copies.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(copies))
    victims = [tmp_path / "victim", tmp_path / "copies/victim", copies / "victim"]
    for victim in victims:
        victim.write_bytes(b"precious")
    shard = Manifest.load(tmp_path / "data").shards[0]
    name = str(victims[0]) if outside == "absolute" else outside
    note = asdict(shard) | {"index": name}
    (tmp_path / "data" / upload.note_name(shard.name)).write_text(json.dumps(note))
    if answers:
        (tmp_path / name.lstrip("/").replace("../", "")).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / Path(name).name).write_bytes(b"new content")
    storage = opened(web)
    assert upload.finished(storage, shard.name, ["key"]) is None
    with pytest.raises(InputError, match="outside"), storage.copies([name]):
        pass
    assert all(victim.read_bytes() == b"precious" for victim in victims)


def test_a_copy_that_fails_takes_nothing_away(web, tmp_path):
    fetcher = Fetcher(str(tmp_path / "cache"), 1 << 20, 0, 2.0)
    (tmp_path / "there").write_bytes(b"precious")
    request = {"do": "copy", "address": f"{web.url}/data", "name": "nothing", "path": str(tmp_path / "there")}
    assert fetcher.answer(request, None)[0]["error"] == "Missing"
    assert (tmp_path / "there").read_bytes() == b"precious"
    assert not list(tmp_path.glob(".there*"))


def test_a_full_disk_for_copies_says_what_to_set(web, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("penstock.streams.sets.remote.store.Store.download", full)
    fetcher = Fetcher(str(tmp_path / "cache"), 1 << 20, 0, 2.0)
    request = {"do": "copy", "address": f"{web.url}/data", "name": "a", "path": str(tmp_path / "a")}
    said = fetcher.answer(request, None)[0]["message"]
    assert "is full" in said and "TMPDIR" in said and "--workers" in said


@pytest.mark.parametrize("do", ["copy", "content", "whole"])
def test_a_server_without_ranges_is_an_error_in_words(web, monkeypatch, do):
    storage = opened(web)
    answer = {"error": "NoRanges", "message": "a: the server sends whole files alone", "retries": 0, "counts": {}}
    monkeypatch.setattr(storage._link, "ask", lambda *_: (answer, None))
    with pytest.raises(InputError, match="whole files alone"):
        storage.ask(do, name="a")


def test_an_index_that_leaves_the_cache_before_it_is_opened_comes_again(web, tmp_path, monkeypatch):
    load, left = np.load, []

    def late(path, **options):
        if len(left) < 2:
            left.append(path)
            Path(path).unlink()
        return load(path, **options)

    monkeypatch.setattr(np, "load", late)
    manifest = Manifest.load(f"{web.url}/data", Remote(retries=2, timeout=2.0))
    assert ShardReader(manifest).names(0) and len(left) == 2
    left.clear()
    assert len(manifest.storage.local(manifest.shards[0].index, manifest.shards[0].index_sha256, load_records)) == 12


def test_an_index_of_another_user_in_the_cache_is_used(web, monkeypatch):
    manifest = Manifest.load(f"{web.url}/data", Remote(retries=2, timeout=2.0))
    assert ShardReader(manifest).names(0)

    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refused)
    assert ShardReader(manifest).names(0)
    assert len(web.gets("index")) == 1


def test_an_index_is_checked_once(web, monkeypatch):
    manifest = Manifest.load(f"{web.url}/data", Remote(retries=2, timeout=2.0))
    reader, read, seen = ShardReader(manifest), Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: seen.append("cache" in path.parts) or read(path))
    for _ in range(3):
        reader.names(0)
        reader.close()
    assert seen.count(True) == 1


def test_an_empty_image_at_the_end_of_a_shard_is_read(web, tmp_path):
    manifest = Manifest.load(f"{web.url}/data", Remote(retries=2, timeout=2.0))
    reader = ShardReader(manifest)
    begins = reader._opened(0).begins
    assert reader._opened(0).around(int(begins[-1])) == (int(begins[-2]), int(begins[-1]))


def test_two_sets_share_the_room_of_a_cache(web, tmp_path):
    write_set(tmp_path / "more", [12, 5])
    total = sum(shard.bytes for shard in Manifest.load(tmp_path / "data").shards)
    options = Remote(retries=2, timeout=2.0, cache_bytes=total * 3 // 2)
    first, second = (Manifest.load(f"{web.url}/{name}", options) for name in ("data", "more"))
    assert first.storage.whole and not second.storage.whole
    first.storage.expect(total)  # again
    assert first.storage.whole


def test_a_member_that_is_nowhere_is_told_by_a_look_at_some_shards(web, tmp_path, monkeypatch):
    from penstock.streams.extras import check_present

    write_set(tmp_path / "many", [1] * 9)
    manifest = Manifest.load(f"{web.url}/many", Remote(retries=2, timeout=2.0))
    monkeypatch.setattr(type(manifest.storage), "shards_looked_at", 3)
    monkeypatch.setattr("penstock.streams.reader.AHEAD", 1)
    with pytest.raises(InputError, match="in the 3 shards that were looked at"):
        check_present(ShardReader(manifest), {"caption": "txtt"})
    assert len(web.gets("index")) == 3


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_WEB_IDENTITY_TOKEN_FILE"])
def test_a_word_that_is_a_key_too_may_be_in_an_address(monkeypatch, name):
    from penstock.streams.sets.remote.address import place, redacted

    monkeypatch.setenv(name, "testing")
    assert place("s3://testing-data/a").url == "s3://testing-data/a" == redacted("s3://testing-data/a")
    assert ("testing" in redacted("denied: testing")) is name.endswith("_FILE")
    assert place("s3://testing/a").url == "s3://testing/a"


def test_a_secret_in_an_address_is_refused(monkeypatch):
    from penstock.streams.sets.remote.address import place

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-long-secret-of-the-tests")
    with pytest.raises(InputError, match=r"s3://bucket/\*\*\*x holds a credential"):
        place("s3://bucket/a-long-secret-of-the-testsx")


def _fetchers(folder: Path) -> list[Path]:
    return sorted(folder.glob("penstock-*"))


def test_a_fetcher_that_cannot_start_leaves_no_folder(web, tmp_path, monkeypatch):
    (tmp_path / "t").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    monkeypatch.setattr("penstock.streams.sets.remote.link.LONGEST", 1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        opened(web, cache_dir=tmp_path / "file/cache").names()
    assert not _fetchers(tmp_path / "t")


def _ask(storage, barrier, results) -> None:
    barrier.wait()
    results.put(storage.content("manifest.json"))
    barrier.wait()  # the fetcher of who was first serves all of them
    results.put(storage.content("manifest.json"))
    barrier.wait()


def test_workers_whose_fetcher_was_killed_share_one_again(web, tmp_path, monkeypatch):
    (tmp_path / "t").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    monkeypatch.setattr("penstock.streams.sets.remote.link.LONGEST", 1000)
    storage = opened(web)
    content = storage.content("manifest.json")
    os.kill(link._processes[-1].pid, 9)
    link._processes[-1].wait()
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(5), context.Queue()
    workers = [context.Process(target=_ask, args=(storage, barrier, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    barrier.wait(60)
    barrier.wait(60)
    running = subprocess.run(["ps", "-wweo", "args="], capture_output=True, text=True).stdout
    assert running.count(f"remote.fetcher {tmp_path}") == 1
    barrier.wait(60)
    assert [results.get(timeout=30) for _ in range(8)] == [content] * 8
    for worker in workers:
        worker.join(30)
    assert storage.content("manifest.json") == content  # the worker's fetcher has ended with it
    (folder,) = _fetchers(tmp_path / "t")
    end_fetchers()
    link._remove(str(folder), os.getpid())  # as it is when this process ends
    assert not _fetchers(tmp_path / "t")
