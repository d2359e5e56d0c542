"""No damaged byte stays unseen, and what is said of it is right."""

import numpy as np
import pytest

from penstock.cli import main
from penstock.streams.sets.foreign import index_folder
from penstock.streams.sets.manifest import Manifest
from penstock.streams.sets.verify import verify
from tests.trees import class_tree, image_bytes, packed, write_tar


@pytest.fixture
def one_shard(tmp_path):
    """A packed set of three samples in one shard: folder, tar's path, tar's bytes, its records."""
    manifest = packed(class_tree(tmp_path / "tree", classes=3, each=1), tmp_path / "set").manifest
    tar = tmp_path / "set" / manifest.shards[0].name
    return tmp_path / "set", tar, tar.read_bytes(), np.load(tmp_path / "set" / manifest.shards[0].index)


def damage(folder, **settings):
    return verify(Manifest.load(folder), show=False, **settings)


def test_whole_set(one_shard):
    assert damage(one_shard[0]) == []


def expected(byte: int, records: np.ndarray) -> tuple[set[str], str]:
    """Which samples may be named for a flipped byte, and what must be said; by arithmetic on the index alone.

    Our shards hold, per sample: header and payload of the class (a block each), header and payload of the image.
    """
    keys = [key.decode() for key in records["key"]]
    starts, sizes = records["offset"].astype(int), records["size"].astype(int)
    for number, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        before = {keys[number - 1]} if number else set()
        if byte < start - 1024:
            return before | {keys[number]}, "header"
        if byte < start - 512:
            return {keys[number]}, "the label is" if byte == start - 1024 else "padding"
        if byte < start:
            return before | {keys[number]}, "header"
        if byte < start + size:
            return {keys[number]}, "differ from their checksum"
        if byte < -(-(start + size) // 512) * 512:
            return {keys[number]}, "padding after the image"
    return {keys[-1]}, "end mark"


def test_every_kind_of_flipped_byte_is_placed(one_shard):
    folder, tar, whole, records = one_shard
    rng = np.random.default_rng(0)
    places = {*rng.integers(0, len(whole), 150).tolist(), 0, 511, 512, 513, 1024, len(whole) - 1}
    places |= {int(start) - 1024 for start in records["offset"]} | {int(start) for start in records["offset"]}
    ends = records["offset"].astype(int) + records["size"].astype(int)
    places |= {*ends.tolist(), *(ends - 1).tolist()}
    for byte in sorted(places):
        damaged = bytearray(whole)
        damaged[byte] ^= 1 << int(rng.integers(8))
        tar.write_bytes(damaged)
        names, said = expected(byte, records)
        found = damage(folder, decode_images=False)
        assert len(found) == 1, (byte, found)
        assert set(found[0].sample.split(" or ")) <= names, (byte, found, names)
        assert said in found[0].what, (byte, found, said)


def test_all_damage_at_once(one_shard):
    """A header, two payloads, a label and padding: none hides the others."""
    folder, tar, whole, records = one_shard
    keys, starts = [key.decode() for key in records["key"]], records["offset"].astype(int)
    damaged = bytearray(whole)
    for byte in (starts[0] - 512, starts[0] + 9, starts[1] - 1024, starts[2] + 300, len(whole) - 1):
        damaged[byte] ^= 1
    tar.write_bytes(damaged)
    found = damage(folder)
    assert [each.sample for each in found] == [keys[0], keys[0], keys[1], keys[2], keys[2]]
    kinds = ["damaged header", "checksum", "label", "checksum", "end mark"]
    assert all(kind in each.what for kind, each in zip(kinds, found, strict=True))


def test_every_cut_is_noticed_and_names_what_is_lost(one_shard):
    folder, tar, whole, records = one_shard
    ends = records["offset"].astype(int) + records["size"].astype(int)
    for length in range(0, len(whole), 512):
        tar.write_bytes(whole[:length])
        found = damage(folder, decode_images=False)
        assert found
        lost = {key.decode() for key, end in zip(records["key"], ends, strict=True) if end > length}
        if length:
            assert lost <= {name for each in found for name in each.sample.split(" or ")}
    tar.write_bytes(whole + b"\0" * 512)
    assert "too many" in damage(folder)[-1].what


def test_missing_extra_and_broken_files(tmp_path):
    manifest = packed(class_tree(tmp_path / "tree", classes=2, each=6), tmp_path / "set").manifest
    folder = tmp_path / "set"
    (folder / manifest.shards[0].name).unlink()
    (folder / manifest.shards[1].index).write_bytes(b"\x80\x04cos\nsystem\n.")
    (folder / manifest.shards[2].index).unlink()
    (folder / manifest.shards[2].name).write_bytes(b"")
    write_tar(folder / "stray.tar", [])
    said = {(each.file, each.what.split(";")[0]) for each in damage(folder)}
    assert said == {
        (manifest.shards[0].name, "is missing"),
        (manifest.shards[1].index, "differs from its checksum"),
        (manifest.shards[2].name, "is empty"),
        ("stray.tar", "is not in the manifest"),
    }


def test_broken_index_is_made_again(tmp_path):
    manifest = packed(class_tree(tmp_path / "tree"), tmp_path / "set").manifest
    index = tmp_path / "set" / manifest.shards[0].index
    before = index.read_bytes()
    index.write_bytes(before[:-3] + b"xyz")
    assert "`penstock shards index` makes the index again" in damage(tmp_path / "set")[0].what
    assert index_folder(tmp_path / "set", workers=1, show=False)[0] == manifest
    assert index.read_bytes() == before
    assert damage(tmp_path / "set") == []


def test_image_that_was_packed_broken(tmp_path):
    """Tars made elsewhere may hold images that never decoded; only decoding tells."""
    broken = image_bytes(2, size=(240, 160))[:-700]
    write_tar(tmp_path / "a.tar", [("good.jpg", image_bytes(1)), ("bad.jpg", broken), ("worse.png", b"\x80\x04.")])
    index_folder(tmp_path, workers=1, show=False)
    assert damage(tmp_path, decode_images=False) == []
    assert [(each.sample, each.what[:15]) for each in damage(tmp_path)] == [
        ("bad", "does not decode"),
        ("worse", "does not decode"),
    ]


def test_change_in_another_member(tmp_path):
    """It has a checksum of its own, unless its kind is none that an index has a column for."""
    members = [("a.jpg", image_bytes(1)), ("a.txt", b"words"), ("b.jpg", image_bytes(2)), ("b.größe", b"large")]
    tar = write_tar(tmp_path / "a.tar", members)
    index_folder(tmp_path, workers=1, show=False)
    whole = tar.read_bytes()
    tar.write_bytes(whole.replace(b"words", b"sword"))
    assert [(each.sample, each.what) for each in damage(tmp_path)] == [
        ("a", "the 5 bytes of its txt differ from their checksum")
    ]
    tar.write_bytes(whole.replace(b"large", b"small"))
    assert "members other than images" in damage(tmp_path)[0].what


def test_command_line_and_contact_sheet(one_shard, capsys, tmp_path):
    from PIL import Image

    folder, tar, whole, records = one_shard
    assert main(["shards", "verify", str(folder), "--workers", "1"]) == 0
    assert main(["shards", "show", str(folder), "--sheet", str(tmp_path / "sheet.png")]) == 0
    said = capsys.readouterr().out
    assert "every image decodes" in said
    assert "class_2" in said
    with Image.open(tmp_path / "sheet.png") as sheet:  # a 2 x 2 grid; the first cell is the image of class 0
        picture = np.asarray(sheet)
        record = records[records["label"] == 0][0]
        tree = next((tmp_path / "tree" / "class_0").rglob("*.jpg"))
        assert tree.read_bytes() == whole[record["offset"] : record["offset"] + record["size"]]
        with Image.open(tree) as original:
            colours = np.asarray(original)
    assert picture.shape[0] > picture.shape[1] > 200
    top = 6 + (112 - round(112 * 16 / 24)) // 2
    assert np.abs(picture[top + 5, 10].astype(int) - colours[1, 0].astype(int)).max() <= 2
    tar.write_bytes(whole[:2000])
    assert main(["shards", "verify", str(folder), "--workers", "1"]) == 2
    assert "cut off" in capsys.readouterr().out
    assert main(["shards", "show", str(folder)]) == 2


def test_progress_reaches_the_total(tmp_path, monkeypatch):
    """Every sample is counted once, damaged or not, so the bar of a damaged set ends full."""
    from penstock.streams.sets import verify as module

    packed(class_tree(tmp_path / "tree"), tmp_path / "set")
    (tmp_path / "set" / "shard-000001.tar").unlink()
    (tmp_path / "set" / "shard-000002.index.npy").unlink()
    counts: list[int] = []
    monkeypatch.setattr(module.jobs, "run", lambda f, tasks, w, m: [f(*task, counts.append) for task in tasks])
    damage(tmp_path / "set")
    assert sum(counts) == 21
