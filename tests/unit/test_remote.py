"""Object stores one request at a time: addresses, the cache, what answers may be wrong, and where secrets stay."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from penstock.cli import main
from penstock.errors import DONE, INPUT_WRONG, InputError
from penstock.streams.reader import Fault, ShardReader
from penstock.streams.sets.manifest import Manifest
from penstock.streams.sets.remote.address import place, redacted
from penstock.streams.sets.remote.options import Remote, parse_bytes
from penstock.streams.sets.storage import LocalStorage, is_remote, open_storage
from tests.remote import KEY, SECRET, Wire, end_fetchers, environment, put, s3, upload
from tests.shards import damage, write_set
from tests.unit.test_train_stream import stream

SIZES = [30, 17]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("set") / "data", SIZES).root


@pytest.fixture(scope="module")
def store():
    with s3() as wire:
        yield wire


@pytest.fixture
def bucket(store, tmp_path, monkeypatch):
    """moto's S3, through a wire without faults, for this process and its fetchers."""
    store.spoils.clear()
    store.log.clear()
    store.headers.clear()
    for name, value in environment(store, tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    yield store
    end_fetchers()


@pytest.fixture
def web(folder, tmp_path, monkeypatch):
    """A plain web server for the set's folder."""
    wire = Wire(folder=folder.parent)
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    yield wire
    end_fetchers()
    wire.close()


def quick(**options) -> Remote:
    return Remote(**{"retries": 3, "timeout": 2.0} | options)


def everything(manifest: Manifest, block: int = 8) -> list:
    """Every sample of a set, or why it cannot be read."""
    reader, found = ShardReader(manifest), []
    reader.fetch_by(block)
    for shard, each in enumerate(manifest.shards):
        for sample in range(each.samples):
            try:
                found.append(reader.read(shard, sample))
            except Fault as fault:
                found.append(fault.kind)
    return found


# Addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "kind", "url"),
    [
        ("s3://bucket/a/b/", "s3", "s3://bucket/a/b"),
        ("gs://bucket", "gs", "gs://bucket"),
        ("az://container/p", "az", "az://container/p"),
        ("https://host:8443/a%20b/c", "https", "https://host:8443/a%20b/c"),
        ("http://127.0.0.1:80/a", "https", "http://127.0.0.1:80/a"),
        ("hf://datasets/o/n/train", "https", "https://huggingface.co/datasets/o/n/resolve/main/train"),
        ("hf://datasets/o/n@v1", "https", "https://huggingface.co/datasets/o/n/resolve/v1"),
    ],
)
def test_addresses_name_places(address, kind, url, monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    found = place(address)
    assert (found.kind, found.url) == (kind, url)
    assert is_remote(address)


@pytest.mark.parametrize(
    "address",
    [
        *("s3://", "s3://bucket/../other", "s3://bucket//a", "https://host/a b", "hf://models/o/n"),
        *("http://example.org/a", "s3://key:word@bucket/a", "https://host/a?sig=abcdef", "https://host/a#b"),
    ],
)
def test_addresses_that_cannot_be_used_are_refused_before_anything_is_asked(address):
    with pytest.raises(InputError):
        open_storage(address)


@pytest.mark.parametrize("address", ["pipe:cat x", "file:///etc", "S3://bucket/a", "ftp://host/a", "s3:/bucket/a"])
def test_other_schemes_are_refused_with_what_there_is(address):
    with pytest.raises(InputError, match=r"s3://BUCKET/PREFIX"):
        is_remote(address)


def test_folders_stay_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("odd:name").mkdir()
    assert not is_remote("odd:name") and not is_remote("data/train") and not is_remote(Path("s3:/a"))
    assert isinstance(open_storage("data"), LocalStorage)


def test_nothing_of_a_client_is_loaded_for_folders(folder):
    source = (
        "import sys; from penstock.streams.sets.manifest import Manifest\n"
        f"Manifest.load({str(folder)!r}).check_files()\n"
        "print([name for name in ('obstore', 'torch', 'penstock.streams.sets.remote.client') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at s3://user:word@bucket/a: no", "at s3://***@bucket/a: no"),
        ("GET https://h/a?sig=abc&x=1 failed", "GET https://h/a?*** failed"),
        ("(https://h/a?X-Amz-Signature=abc)", "(https://h/a?***)"),
        ("https://h/a: fine", "https://h/a: fine"),
    ],
)
def test_texts_are_redacted(text, shown):
    assert redacted(text) == shown


def test_secrets_of_the_environment_are_redacted(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    assert redacted(f"key {SECRET} token hf_abcdefghijkl") == "key *** token ***"


@pytest.mark.parametrize(("text", "value"), [("64G", 64 << 30), (1000, 1000), ("1.5kb", 1536), ("2TiB", 2 << 40)])
def test_sizes_are_read(text, value):
    assert parse_bytes(text) == value


def test_a_size_that_is_none_is_refused():
    with pytest.raises(ValueError, match="64G"):
        Remote(cache_bytes="much")


# Reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "shards", "ranges"])
def test_a_store_gives_what_the_folder_gives(bucket, folder, mode):
    upload(bucket, folder, "bucket", "read")
    local, remote = Manifest.load(folder), Manifest.load("s3://bucket/read", quick(mode=mode))
    remote.check_files()
    assert remote == local and remote.identity == local.identity and remote.root == "s3://bucket/read"
    assert everything(remote) == everything(local)
    bucket.log.clear()
    assert everything(remote) == everything(local)
    assert bucket.log == []  # all from the cache
    units = sum(-(-size // 8) for size in SIZES) if mode == "ranges" else len(SIZES)
    counters = remote.storage.counters
    assert (counters["cache_hits"], counters["cache_misses"]) == (units, units)
    reader = ShardReader(remote)
    for shard in range(len(SIZES)):
        for name in ("id", "label", "offset"):
            assert np.array_equal(reader.column(shard, name), ShardReader(local).column(shard, name))


def test_a_set_below_an_address_is_found_as_below_a_folder(bucket, folder, tmp_path):
    upload(bucket, folder, "bucket", "sets/val")
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "val").symlink_to(folder)
    for where in ("s3://bucket/sets", "s3://bucket/sets/val", tmp_path / "sets", tmp_path / "sets" / "val"):
        assert Manifest.inside(where, "val").samples == sum(SIZES)
    for where in ("s3://bucket/none", tmp_path / "none"):
        with pytest.raises(InputError, match=r"none (has no manifest|is not a folder)"):
            Manifest.inside(where, "val")


@pytest.mark.parametrize("mode", ["shards", "ranges"])
def test_a_cold_cache_has_no_hits_though_all_is_asked_for_ahead(bucket, folder, mode):
    upload(bucket, folder, "bucket", f"cold-{mode}")
    for warm in (False, True):
        remote = {"mode": mode, "retries": 3, "timeout": 2.0}
        read = stream(f"s3://bucket/cold-{mode}", batch=8, remote=remote, block=8)  # type: ignore[arg-type]
        counts: Counter[str] = Counter()
        for batch in islice(read.batches(0), sum(SIZES) // 8 + 1):
            counts.update(batch.timing)
        units = sum(-(-size // 8) for size in SIZES) if mode == "ranges" else len(SIZES)
        assert (counts["cache_hits"], counts["cache_misses"]) == ((units, 0) if warm else (0, units))
        shards = sum(shard.bytes for shard in Manifest.load(folder).shards)
        indices = sum((folder / shard.index).stat().st_size for shard in Manifest.load(folder).shards)
        assert counts["fetched_bytes"] == (0 if warm else shards + indices)
        end_fetchers()


def test_blocks_are_fetched_whole_and_once(bucket, folder):
    upload(bucket, folder, "bucket", "blocks")
    manifest = Manifest.load("s3://bucket/blocks", quick(mode="ranges"))
    reader = ShardReader(manifest)
    reader.fetch_by(8)
    for sample in (9, 15, 8, 12):
        reader.read(0, sample)
    spans = [span for _, _, span, _ in bucket.gets(r"blocks/shard-000000\.tar")]
    offsets = ShardReader(Manifest.load(folder)).column(0, "offset").tolist()
    assert spans == [f"bytes={offsets[8]}-{offsets[16] - 1}"]
    reader.prepare([(0, 0), (0, 20), (1, 3), (0, 21), (-1, -1)])
    deadline = time.monotonic() + 10
    while len(bucket.gets(r"blocks/.*\.tar")) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    for place_of_sample in ((0, 1), (0, 22), (1, 7)):
        reader.read(*place_of_sample)
    assert len(bucket.gets(r"blocks/.*\.tar")) == 4


def test_a_set_larger_than_the_cache_is_read_by_ranges(folder, web):
    small = Manifest.load(f"{web.url}/data", quick(cache_bytes=20_000))
    assert sum(shard.bytes for shard in small.shards) > 20_000 and not small.storage.whole
    assert Manifest.load(f"{web.url}/data", quick()).storage.whole


def test_large_blocks_are_halved():
    from penstock.streams.reader import _begins
    from penstock.streams.sets.manifest import Shard

    index = np.zeros(1000, dtype=[("offset", "<u8")])
    index["offset"] = 512 + np.arange(1000) * 1_000_000
    shard = Shard("a.tar", 1000 * 1_000_000, "", 1000, "a", "")
    begins = _begins(index, shard, 256)
    assert begins[0] == 0 and begins[-1] == shard.bytes and set(np.diff(begins[1:-1])) == {64_000_000}


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("mode", ["shards", "ranges"])
def test_a_web_server_with_and_without_ranges(web, folder, ranges, mode):
    web.ranges = ranges
    manifest = Manifest.load(f"{web.url}/data", quick(mode=mode))
    manifest.check_files()
    assert everything(manifest) == everything(Manifest.load(folder))
    if not ranges:
        assert all(status == 200 for _, _, _, status in web.log)
    if mode == "shards":
        assert len(web.gets(r"\.tar")) == len(SIZES)


def test_hugging_face_addresses_bring_the_token_to_the_hub_alone(web, folder, tmp_path, monkeypatch):
    hub = tmp_path / "datasets/owner/name/resolve/v2"
    hub.mkdir(parents=True)
    (hub / "train").symlink_to(folder)
    web.folder = tmp_path
    monkeypatch.setenv("HF_ENDPOINT", web.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    manifest = Manifest.load("hf://datasets/owner/name@v2/train", quick())
    assert everything(manifest) == everything(Manifest.load(folder))
    assert all(headers["authorization"] == "Bearer hf_secretsecret" for headers in web.headers)
    assert "hf_secret" not in f"{manifest.root} {manifest!r} {manifest.storage.key} {place('hf://datasets/o/n')!r}"


# What goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["shards", "ranges"])
@pytest.mark.parametrize("kind", ["503", "429", "500", "cut", "reset", "hang", "shift", "whole", "tag", "flip"])
def test_answers_that_are_wrong_once_are_noticed_and_mended(web, folder, kind, mode):
    spoil = web.spoil(kind, r"GET .*shard-000000\.tar")
    manifest = Manifest.load(f"{web.url}/data", quick(mode=mode, timeout=0.5 if kind == "hang" else 2.0))
    assert everything(manifest) == everything(Manifest.load(folder))
    assert spoil.seen == 1
    silent = {"flip", "whole"} if mode == "ranges" else {"flip", "whole", "tag", "shift"}
    assert manifest.storage.counters["retries"] == (0 if kind in silent else 1)


def test_a_range_that_is_always_cut_short_is_a_fault_of_its_samples_alone(web, folder):
    web.spoil("cut", r"GET .*shard-000001\.tar", times=None)
    found = everything(Manifest.load(f"{web.url}/data", quick(mode="ranges", retries=1)), block=32)
    assert found[SIZES[0] :] == ["unreachable"] * SIZES[1]
    assert found[: SIZES[0]] == everything(Manifest.load(folder))[: SIZES[0]]


def test_a_whole_shard_that_breaks_off_is_taken_up_where_it_ended(tmp_path, web):
    web.folder = tmp_path
    rng = np.random.default_rng(0)
    big = rng.integers(0, 256, 3 << 20, dtype=np.uint8).tobytes()
    write_set(tmp_path / "big", [2], content=lambda number: big[number:])
    web.spoil("cut", r"GET .*\.tar")
    manifest = Manifest.load(f"{web.url}/big", quick())
    everything(manifest)
    first, second = web.gets(r"\.tar")
    assert first[2] == "" and second[2].startswith("bytes=") and second[2] != "bytes=0-" and second[3] == 206


@pytest.mark.parametrize("mode", ["shards", "ranges"])
def test_a_damaged_sample_is_one_fault_as_it_is_in_a_folder(tmp_path, web, mode):
    web.folder = tmp_path
    manifest = write_set(tmp_path / "set", SIZES)
    damage(manifest, 3)
    found = everything(Manifest.load(f"{web.url}/set", quick(mode=mode)))
    assert found == everything(manifest)
    assert found.count("changed") == 1
    whole = [file.read_bytes() for file in (tmp_path / "cache").glob("*/*")]
    assert (tmp_path / "set" / manifest.shards[0].name).read_bytes() not in whole  # it fails the manifest's checksum
    assert ((tmp_path / "set" / manifest.shards[1].name).read_bytes() in whole) is (mode == "shards")


@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize("mode", ["shards", "ranges"])
def test_another_version_of_a_shard_is_never_served(tmp_path, web, mode, longer):
    web.folder = tmp_path
    write_set(tmp_path / "set", SIZES)
    manifest = Manifest.load(f"{web.url}/set", quick(mode=mode))
    reader = ShardReader(manifest)
    reader.fetch_by(8)
    reader.read(0, 0)
    other = write_set(tmp_path / "other", SIZES, content=lambda number: b"another version" * (200 if longer else 15))
    (tmp_path / "other" / other.shards[1].name).replace(tmp_path / "set" / manifest.shards[1].name)
    for sample in range(SIZES[1]):
        with pytest.raises(Fault) as caught:
            reader.read(1, sample)
        assert caught.value.kind == "changed"
    assert (other.shards[1].bytes == manifest.shards[1].bytes) is not longer
    if longer:
        assert "bytes instead of" in str(caught.value)
        with pytest.raises(InputError, match=r"shard-000001\.tar has .* bytes instead of"):
            manifest.check_files()


def test_a_version_that_changes_midway_is_judged_by_its_bytes(web, folder):
    manifest = Manifest.load(f"{web.url}/data", quick(mode="ranges"))
    reader = ShardReader(manifest)
    reader.fetch_by(4)
    expected = everything(Manifest.load(folder))
    assert reader.read(0, 0) == expected[0]
    web.spoil("tag", r"GET .*\.tar", times=None)
    assert [reader.read(0, sample) for sample in range(30)] == expected[:30]  # the same bytes under another tag
    assert manifest.storage.counters["retries"] == 1


def test_an_object_that_is_gone_is_a_fault_and_named_before_a_run(tmp_path, web):
    web.folder = tmp_path
    manifest = write_set(tmp_path / "set", SIZES)
    (tmp_path / "set" / manifest.shards[1].name).unlink()
    remote = Manifest.load(f"{web.url}/set", quick())
    with pytest.raises(InputError, match=r"shard-000001\.tar is missing"):
        remote.check_files()
    assert everything(remote)[SIZES[0] :] == ["missing"] * SIZES[1]


def test_a_store_that_refuses_says_how_to_be_let_in(web):
    web.spoil("403", times=None)
    with pytest.raises(InputError, match="set credentials in the environment"):
        Manifest.load(f"{web.url}/data", quick())
    assert len(web.log) == 1  # asking again would not help


def test_azure_without_an_account_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(InputError, match=r"Account must be .*; set credentials .* AZURE_STORAGE_ACCOUNT_NAME"):
        Manifest.load("az://container/set", quick(cache_dir=tmp_path))
    end_fetchers()


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path, web):
    web.folder = tmp_path
    write_set(tmp_path / "set", [3])
    text = (tmp_path / "set/manifest.json").read_text()
    for name in ("../other.tar", "/etc/passwd", "https://host/a.tar", "file:a.tar"):
        content = json.loads(text)
        content["shards"][0]["name"] = name
        (tmp_path / "set/manifest.json").write_text(json.dumps(content))
        with pytest.raises(InputError):
            Manifest.load(f"{web.url}/set", quick())
    assert all(path.endswith("/set/manifest.json") for _, path, _, _ in web.log)


def test_no_secret_is_in_messages_logs_or_settings(bucket, folder, capfd, tmp_path):
    upload(bucket, folder, "bucket", "secret")
    bucket.spoil("500", r"GET /bucket/secret/shard", times=None)
    manifest = Manifest.load("s3://bucket/secret", quick(retries=1))
    with pytest.raises(InputError) as caught:
        ShardReader(manifest).read(0, 0)
    said = [str(caught.value), repr(manifest), repr(manifest.storage), manifest.storage.key, *capfd.readouterr()]
    assert all(SECRET not in text and KEY not in text for text in said)
    assert all(SECRET not in value for headers in bucket.headers for value in headers.values())
    for file in (tmp_path / "cache").rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes()


# Processes -------------------------------------------------------------------------------------


def _read_in_fork(manifest: Manifest, results) -> None:
    results.put(everything(manifest))


def test_forks_of_a_process_that_has_read_read_on(bucket, folder):
    upload(bucket, folder, "bucket", "fork")
    manifest = Manifest.load("s3://bucket/fork", quick(mode="ranges"))
    first = ShardReader(manifest).read(0, 0)  # the parent has a fetcher and a connection
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    forks = [context.Process(target=_read_in_fork, args=(manifest, results)) for _ in range(3)]
    for fork in forks:
        fork.start()
    found = [results.get(timeout=60) for _ in forks]
    for fork in forks:
        fork.join()
    assert found == [everything(Manifest.load(folder))] * 3
    assert found[0][0] == first


def test_threads_read_side_by_side(web, folder):
    manifest = Manifest.load(f"{web.url}/data", quick(mode="ranges"))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: everything(manifest), range(8)))
    assert found == [everything(Manifest.load(folder))] * 8
    spans = [(path, span) for _, path, span, _ in web.gets(r"\.tar")]
    assert len(spans) == len(set(spans))  # each block once, for whoever came first


def _fetchers_of(parent: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(parent)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "remote.fetcher" in line]


def test_a_fetcher_ends_with_who_asked_however_it_went(web):
    source = (
        "import os, sys; from penstock.streams.sets.manifest import Manifest\n"
        f"Manifest.load('{web.url}/data'); print('ready', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout and process.stdin
    assert process.stdout.readline() == b"ready\n"
    (fetcher,) = _fetchers_of(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while _alive(fetcher) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(fetcher)


def _alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_a_fetcher_that_was_killed_is_started_anew(web, folder):
    manifest = Manifest.load(f"{web.url}/data", quick())
    (fetcher,) = _fetchers_of(os.getpid())
    os.kill(fetcher, 9)
    assert everything(manifest) == everything(Manifest.load(folder))


# The cache in use ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["shards", "ranges"])
def test_a_cache_too_small_for_anything_still_reads_right(web, folder, mode, capfd):
    small = quick(mode=mode, cache_bytes=9_000)  # the indices fit
    found = everything(Manifest.load(f"{web.url}/data", small))
    assert found == everything(Manifest.load(folder))
    end_fetchers()
    assert "no room" in capfd.readouterr().err


def test_bytes_that_rot_in_the_cache_are_fetched_anew(web, folder, tmp_path):
    manifest = Manifest.load(f"{web.url}/data", quick())
    expected = everything(manifest)
    for file in (tmp_path / "cache").glob("*/*"):
        if file.suffix != ".part":
            rotten = bytearray(file.read_bytes())
            rotten[len(rotten) // 2 :: 3] = bytes(len(rotten[len(rotten) // 2 :: 3]))
            file.write_bytes(rotten)
    assert everything(Manifest.load(f"{web.url}/data", quick())) == expected


def test_sets_with_files_of_the_same_names_do_not_mix(tmp_path, web):
    web.folder = tmp_path
    for name in ("a", "b"):
        write_set(tmp_path / name, [5], content=lambda number, name=name: name.encode() * (number + 200))
    found = [everything(Manifest.load(f"{web.url}/{name}", quick())) for name in ("a", "b")]
    assert found == [everything(Manifest.load(tmp_path / name)) for name in ("a", "b")]
    assert found[0] != found[1]


# Writing ---------------------------------------------------------------------------------------


def trees(root: Path, count: int = 12) -> Path:
    for number in range(count):
        path = root / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(write_png(number))
    return root


def write_png(number: int) -> bytes:
    from tests.shards import pixels_of, png

    return png(pixels_of(number))


def test_a_set_is_packed_verified_indexed_and_shown_in_a_store(bucket, tmp_path, capsys):
    images = trees(tmp_path / "images")
    pack = ["shards", "pack", str(images), "--samples-per-shard", "5", "--workers", "1"]
    assert main([*pack, str(tmp_path / "local")]) == DONE
    assert main([*pack, "s3://bucket/packed"]) == DONE
    local, remote = Manifest.load(tmp_path / "local"), Manifest.load("s3://bucket/packed")
    assert remote == local and everything(remote) == everything(local)
    assert remote.storage.names() == sorted(path.name for path in (tmp_path / "local").iterdir())
    bucket.log.clear()
    assert main([*pack, "s3://bucket/packed"]) == DONE
    assert "nothing to do" in capsys.readouterr().out
    assert not [path for method, path, _, _ in bucket.log if method == "PUT" and path.endswith(".tar")]
    assert main(["shards", "verify", "s3://bucket/packed", "--workers", "1"]) == DONE
    assert main(["shards", "show", "s3://bucket/packed", "--sheet", str(tmp_path / "sheet.png")]) == DONE
    assert main(["shards", "index", "s3://bucket/packed", "--workers", "1"]) == DONE
    assert Manifest.load("s3://bucket/packed") == local
    assert main([*pack, "s3://bucket/packed", "--limit", "4"]) == INPUT_WRONG


def test_verify_names_damage_in_a_store(bucket, tmp_path, capsys):
    manifest = write_set(tmp_path / "set", SIZES)
    key = damage(manifest, 5)
    (tmp_path / "set" / manifest.shards[1].index).unlink()
    (tmp_path / "set/stranger.tar").write_bytes(b"x")
    upload(bucket, tmp_path / "set", "bucket", "verify")
    assert main(["shards", "verify", "s3://bucket/verify", "--fast", "--workers", "1"]) == INPUT_WRONG
    said = capsys.readouterr().out
    assert key in said and "shard-000001.index.npy" in said and "is missing" in said and "stranger.tar" in said


def test_a_pack_that_was_stopped_goes_on_with_what_arrived(bucket, tmp_path):
    images = trees(tmp_path / "images")
    pack = ["shards", "pack", str(images), "s3://bucket/stopped", "--samples-per-shard", "4", "--workers", "1"]
    bucket.spoil("403", r"PUT /bucket/stopped/shard-000002\.tar", times=None)
    assert main(pack) == INPUT_WRONG
    with pytest.raises(InputError, match="unfinished pack"):
        Manifest.load("s3://bucket/stopped")
    bucket.spoils.clear()
    bucket.log.clear()
    assert main(pack) == DONE
    sent = [path.rpartition("/")[2] for method, path, _, _ in bucket.log if method == "PUT" and path.endswith(".tar")]
    assert sent == ["shard-000002.tar"]
    assert main(["shards", "pack", str(images), str(tmp_path / "local"), *pack[4:]]) == DONE
    assert Manifest.load("s3://bucket/stopped") == Manifest.load(tmp_path / "local")
    assert not [name for name in open_storage("s3://bucket/stopped").ask("names")[0]["names"] if name.startswith(".")]


def test_a_large_shard_goes_up_in_parts(bucket, tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 40 << 20, dtype=np.uint8).tobytes()
    (tmp_path / "large").write_bytes(data)
    storage = open_storage("s3://bucket/parts")
    storage.write("large", tmp_path / "large")
    assert storage.content("large") == data
    assert sum("partNumber" in path for method, path, _, _ in bucket.log if method == "PUT") == 3


def test_tars_made_elsewhere_are_indexed_in_a_store(bucket, folder, tmp_path):
    for path in folder.glob("*.tar"):
        put(bucket, "bucket", f"theirs/{path.name}", path.read_bytes())
    put(bucket, "bucket", "theirs/classes.txt", "\n".join(f"class{number}" for number in range(10)).encode())
    assert main(["shards", "index", "s3://bucket/theirs", "--workers", "1"]) == DONE
    assert everything(Manifest.load("s3://bucket/theirs")) == everything(Manifest.load(folder))
    put(bucket, "bucket", "theirs/shard-000000.tar", next(folder.glob("*1.tar")).read_bytes())
    assert main(["shards", "index", "s3://bucket/theirs", "--workers", "1"]) == INPUT_WRONG


def test_nothing_is_written_to_a_web_server(web, tmp_path):
    with pytest.raises(InputError, match="nothing can be written"):
        open_storage(f"{web.url}/data").write("a", b"b")


def test_a_recipe_whose_set_is_not_in_its_store_is_told_before_a_run(web, tmp_path, capsys):
    from penstock.stage import main as stage
    from pretrain.recipe import Pretrain

    recipe = tmp_path / "recipe.yaml"
    lines = ("name: run", "duration: 2 steps", "batch: 2", "method: {name: simclr}", "optim: {lr: 0.1}")
    lines += ("backbone: {name: resnet18}", "augment: {name: simclr}", "evaluate: null")
    recipe.write_text("\n".join((*lines, f"data: {{train: '{web.url}/nothing', val: '{web.url}/data'}}")))
    assert stage("pretrain", Pretrain, lambda _: pytest.fail("a run was started"), [str(recipe), "--check"]) == DONE
    said = capsys.readouterr().out
    assert "data.train" in said and "has no manifest" in said and "data.val" not in said


def test_a_recipe_keeps_no_credential(tmp_path, capsys):
    from penstock.stage import main as stage
    from pretrain.recipe import Pretrain

    recipe = tmp_path / "recipe.yaml"
    lines = ("name: run", "duration: 2 steps", "batch: 2", "method: {name: simclr}", "optim: {lr: 0.1}")
    lines += ("backbone: {name: resnet18}", "data: {train: 's3://user:hunter2@bucket/a', val: null}", "evaluate: null")
    recipe.write_text("\n".join(lines))
    code = stage("pretrain", Pretrain, lambda _: pytest.fail("a run was started"), [str(recipe), "--check"])
    said = "".join(capsys.readouterr())
    assert code == INPUT_WRONG and "data.train" in said and "credential" in said and "hunter2" not in said


@pytest.mark.parametrize("same", [True, False])
def test_two_packs_that_begin_at_once_agree_on_one_plan(bucket, tmp_path, monkeypatch, same, capsys):
    from penstock.streams.sets import pack as packing

    images, measure = trees(tmp_path / "images"), packing._sample_bytes
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / f"cache{same}"))
    command = ["shards", "pack", str(images), f"s3://bucket/race{same}", "--workers", "1", "--samples-per-shard"]
    codes = []

    def other_is_faster(*asked):
        monkeypatch.setattr(packing, "_sample_bytes", measure)
        bucket.spoil("403", r"PUT .*\.tar")  # it gets no further than its plan for now
        codes.append(main([*command, "4" if same else "5"]))
        return measure(*asked)

    monkeypatch.setattr(packing, "_sample_bytes", other_is_faster)
    codes.append(main([*command, "4"]))
    assert codes == [INPUT_WRONG, DONE if same else INPUT_WRONG]
    assert ("shard_samples differ" in capsys.readouterr().err) is not same


def test_a_store_without_conditions_is_written_without(bucket):
    storage = open_storage("s3://bucket/plain")
    bucket.spoil("501", "PUT .*plain/a")
    assert storage.create("a", b"1") and not storage.create("a", b"2")
    assert storage.content("a") == b"1"
