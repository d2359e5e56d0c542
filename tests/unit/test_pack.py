"""Packing: what is written, that it does not depend on how, and what is refused."""

import errno
import os
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from penstock.cli import main
from penstock.errors import InputError
from penstock.progress import progress
from penstock.splitmix import splitmix64
from penstock.streams.sets import jobs
from penstock.streams.sets import pack as packing
from penstock.streams.sets.manifest import Manifest
from tests.trees import class_tree, fingerprints, image_bytes, packed, read_plainly


def test_plain_webdataset_reads_the_same_samples(tmp_path):
    tree = class_tree(tmp_path / "tree")
    manifest = packed(tree, tmp_path / "set").manifest
    assert manifest.classes == ("class_0", "class_1", "class_2")
    assert [shard.samples for shard in manifest.shards] == [4, 4, 4, 4, 4, 1]
    originals = {path.read_bytes(): int(path.relative_to(tree).parts[0][-1]) for path in tree.rglob("*.jpg")}
    plain = read_plainly(tmp_path / "set")
    assert {sample["jpg"]: int(sample["cls"]) for sample in plain.values()} == originals
    assert manifest.samples == len(plain) == 21
    assert manifest.class_counts == {0: 7, 1: 7, 2: 7}


def test_index_says_what_the_tar_holds(tmp_path):
    """Offsets, checksums, ids and sizes against a slow reading by other means."""
    packed(class_tree(tmp_path / "tree"), tmp_path / "set")
    manifest = Manifest.load(tmp_path / "set")
    plain = read_plainly(tmp_path / "set")
    total = 0
    for shard in manifest.shards:
        data = (tmp_path / "set" / shard.name).read_bytes()
        records = np.load(tmp_path / "set" / shard.index, allow_pickle=False, mmap_mode="r")
        names = ("offset", "size", "crc", "id", "label", "width", "height", "key")
        assert records.dtype.names == names
        assert [records.dtype[name].str for name in names[:-1]] == ["<u8", "<u4", "<u4", "<u8", "<i4", "<u4", "<u4"]
        for record in records:
            sample = plain[record["key"].decode()]
            payload = data[record["offset"] : record["offset"] + record["size"]]
            assert payload == sample["jpg"]
            assert zlib.crc32(payload) == record["crc"]
            assert record["id"] == int.from_bytes(blake2b(record["key"]).digest()[:8], "little")
            assert record["label"] == int(sample["cls"])
            assert (record["width"], record["height"]) == (24, 16)
            total += splitmix64(int(record["id"]))
    assert manifest.digest_of_ids == total % 2**64


def test_shards_mix_classes_and_limit_takes_from_all(tmp_path):
    tree = class_tree(tmp_path / "tree", classes=4, each=40)
    packed(tree, tmp_path / "set", shard_samples=40)
    for shard in Manifest.load(tmp_path / "set").shards:
        labels = Counter(np.load(tmp_path / "set" / shard.index)["label"].tolist())
        assert len(labels) == 4
        assert max(labels.values()) < 25
    assert len(packed(tree, tmp_path / "few", limit=40).manifest.class_counts) == 4
    sorted_set = packed(tree, tmp_path / "sorted", shard_samples=40, shuffle_seed=None).manifest
    assert np.load(tmp_path / "sorted" / sorted_set.shards[0].index)["label"].tolist() == [0] * 40
    other = packed(tree, tmp_path / "other", shard_samples=40, shuffle_seed=1).manifest
    assert other.identity != Manifest.load(tmp_path / "set").identity
    assert other.digest_of_ids == sorted_set.digest_of_ids  # the same samples in another order


def test_bytes_do_not_depend_on_workers(tmp_path):
    tree = class_tree(tmp_path / "tree")
    packed(tree, tmp_path / "one", workers=1)
    packed(tree, tmp_path / "three", workers=3)
    assert fingerprints(tmp_path / "one") == fingerprints(tmp_path / "three")


def test_killed_and_run_again_gives_the_same_bytes(tmp_path):
    """kill -9 as soon as a shard is finished, several times over; workers must not outlive their parent."""
    tree = class_tree(tmp_path / "tree", classes=2, each=60)
    packed(tree, tmp_path / "whole", shard_samples=2)
    dest = tmp_path / "killed"
    command = [sys.executable, "-m", "penstock.cli", "shards", "pack", str(tree), str(dest)]
    command += ["--samples-per-shard", "2", "--workers"]
    for workers, wanted in (("1", 3), ("2", 10)):
        process = subprocess.Popen([*command, workers], stderr=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 60
        while process.poll() is None and len(list(dest.glob("*.tar"))) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        killed = process.poll() is None
        process.kill()
        process.wait()
        assert killed
        with pytest.raises(InputError, match="unfinished pack"):
            Manifest.load(dest)
    last = subprocess.run([*command, "1"], capture_output=True, text=True, check=True)
    assert "finished before" in last.stdout
    assert fingerprints(dest) == fingerprints(tmp_path / "whole")
    deadline = time.monotonic() + 20
    while any(_in_group(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(_in_group(process.pid))


def _in_group(group: int):
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            yield path


def test_a_damaged_finished_shard_is_packed_again(tmp_path):
    tree = class_tree(tmp_path / "tree")
    packed(tree, tmp_path / "set")
    before = fingerprints(tmp_path / "set")
    tar = tmp_path / "set" / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[2000] ^= 1
    tar.write_bytes(content)
    again = packed(tree, tmp_path / "set")
    assert (again.kept, again.written) == (5, 4)
    assert fingerprints(tmp_path / "set") == before


def test_another_plan_is_refused(tmp_path):
    tree = class_tree(tmp_path / "tree")
    packed(tree, tmp_path / "set")
    for change in ({"shard_samples": 5}, {"shuffle_seed": 1}, {"limit": 3}, {"labels": False}):
        with pytest.raises(InputError, match="another plan"):
            packed(tree, tmp_path / "set", **change)
    (tree / "class_1" / "new.jpg").write_bytes(image_bytes(1))
    with pytest.raises(InputError, match="another plan"):
        packed(tree, tmp_path / "set")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not empty.*thesis\.txt"):
        packed(tree, tmp_path / "full")


def test_images_that_do_not_open_are_listed(tmp_path):
    tree = class_tree(tmp_path / "tree")
    (tree / "class_0" / "cut.jpg").write_bytes(image_bytes(5, size=(240, 160))[:-900])
    (tree / "class_1" / "empty.png").write_bytes(b"")
    (tree / "class_2" / "pickle.jpg").write_bytes(b"\x80\x04\x95cos\nsystem\n.")
    header = bytearray(image_bytes(6, "PNG"))
    header[16:24] = (50_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (tree / "class_2" / "bomb.png").write_bytes(header)
    names = ["class_0/cut.jpg", "class_1/empty.png", "class_2/pickle.jpg", "class_2/bomb.png"]
    for allowed in (0, 3):
        with pytest.raises(InputError) as caught:
            packed(tree, tmp_path / "set", skip_bad=allowed)
        assert all(name in str(caught.value) for name in names)
        assert "--skip-bad 4" in str(caught.value)
        assert not (tmp_path / "set" / "manifest.json").exists()
    done = packed(tree, tmp_path / "set", skip_bad=4)
    assert (done.manifest.samples, len(done.skipped), len(done.manifest.pack["skipped"])) == (21, 4, 4)
    for name in names:
        (tree / name).unlink()
    assert set(read_plainly(tmp_path / "set"))


def test_a_mended_image_joins_when_packing_goes_on(tmp_path):
    tree = class_tree(tmp_path / "tree")
    bad = tree / "class_1" / "image_0.jpg"
    good = bad.read_bytes()
    packed(tree, tmp_path / "whole")
    bad.write_bytes(good[:200])
    with pytest.raises(InputError, match=r"class_1/image_0\.jpg"):
        packed(tree, tmp_path / "set")
    bad.write_bytes(good)
    assert packed(tree, tmp_path / "set").kept == 5
    assert fingerprints(tmp_path / "set") == fingerprints(tmp_path / "whole")


def test_full_disk(tmp_path, monkeypatch):
    tree = class_tree(tmp_path / "tree")
    with monkeypatch.context() as patch:
        patch.setattr(packing.shutil, "disk_usage", lambda _: packing.shutil._ntuple_diskusage(10, 0, 100))
        with pytest.raises(InputError, match="GB are needed"):
            packed(tree, tmp_path / "set")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(packing.os, "fsync", full)
        with pytest.raises(InputError, match="is full"):
            packed(tree, tmp_path / "set")
    assert not list((tmp_path / "set").glob("*.tar"))
    assert packed(tree, tmp_path / "set").manifest.samples == 21


def _killed_at_once(advance: Callable[[int], None]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_killed_for_memory_is_said():
    with progress("dying", 2, show=False) as meter, pytest.raises(InputError, match="fewer --workers"):
        jobs.run(_killed_at_once, [(), ()], 2, meter)


def test_two_packs_into_one_folder(tmp_path):
    with packing.claimed(tmp_path / "set"), pytest.raises(InputError, match="another process"):
        packed(class_tree(tmp_path / "tree"), tmp_path / "set")


def test_places_that_cannot_work(tmp_path):
    tree = class_tree(tmp_path / "tree")
    with pytest.raises(InputError, match="lies inside SOURCE"):
        packing.refuse_nested(tree, tree / "class_0" / "set")
    with pytest.raises(InputError, match="does not exist"):
        packed(tmp_path / "nowhere", tmp_path / "set")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        packed(tree, tmp_path / "file" / "set")


@pytest.mark.parametrize("command, code, said", [("no-source", 2, "does not exist"), ("digits", 0, "359 images")])
def test_command_line(tmp_path, capsys, command, code, said):
    source = "digits:test" if command == "digits" else str(tmp_path / "nothing")
    assert main(["shards", "pack", source, str(tmp_path / "set"), "--workers", "1"]) == code
    assert said in "".join(capsys.readouterr())


def test_control_c_leaves_no_draft_and_goes_on(tmp_path):
    tree = class_tree(tmp_path / "tree", classes=2, each=60)
    line = [sys.executable, "-m", "penstock.cli", "shards", "pack", str(tree), str(tmp_path / "set")]
    line += ["--samples-per-shard", "1", "--workers", "1"]
    # A test run in the background of a shell ignores SIGINT, and its children inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    while process.poll() is None and not list(tmp_path.glob("set/*.tar")):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert "goes on from them" in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("set/*.tmp-*"))
