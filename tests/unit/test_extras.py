"""Members beside the image: each sample with its own, nothing unpickled, damage counted."""

import io
import pickle
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from penstock.augment.crop_flip import CropFlip
from penstock.cli import main
from penstock.errors import InputError
from penstock.streams import extras
from penstock.streams.data import Data
from penstock.streams.images import Images
from penstock.streams.reader import ShardReader
from penstock.streams.sets.manifest import Manifest
from penstock.streams.sets.remote.options import Remote
from tests.members import EXTRA, TOTAL, members_of, npy, same, slots, stream, take, write_set
from tests.remote import Wire
from tests.shards import png


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"))


def test_every_sample_comes_with_its_own_members(folder):
    found = slots(take(stream(folder, extra=EXTRA), 8))
    assert len(found) == 64
    numbers = [sample["number"] for _, sample in sorted(found.items())]
    assert sorted(numbers[:TOTAL]) == list(range(TOTAL))
    for sample in found.values():
        number = sample["number"]
        assert (sample["key"], sample["weight"], sample["label"]) == (f"s{number:03d}", 1, number % 7)
        assert same({name: sample[name] for name in EXTRA}, {"caption": None} | members_of(number))


def test_only_what_is_asked_for_and_nothing_without(folder):
    assert stream(folder).after is None
    batch = take(stream(folder), 1)[0]
    assert (batch.members, batch.extra) == ({}, {})
    batch = take(stream(folder, extra={"words": "txt"}), 1)[0]
    assert list(batch.members) == ["words"] and batch.extra == {}


def test_members_leave_the_views_and_the_order_as_they_are(folder):
    augment = CropFlip(CropFlip.Config(size=8))
    plain, more = (take(stream(folder, augment=augment, **more), 5) for more in ({}, {"extra": EXTRA}))
    for one, other in zip(plain, more, strict=True):
        assert one.keys == other.keys and torch.equal(one.views[0], other.views[0])
        assert one.ids is not None and one.ids.tolist() == other.ids.tolist()  # type: ignore[union-attr]
        assert other.timing["bytes"] > one.timing["bytes"]


def test_other_readings_of_the_bytes_agree(folder):
    """Against tarfile, which walks the headers."""
    for path in folder.glob("*.tar"):
        records = np.load(path.with_suffix(".index.npy"))
        suffixes = [name for name in records.dtype.names if name.startswith("extra.")]
        assert suffixes == ["extra.json", "extra.mask.png", "extra.npy", "extra.txt"]
        data = path.read_bytes()
        with tarfile.open(path) as tar:
            names = set(tar.getnames())
            for record in records:
                for column in suffixes:
                    offset, size, _ = record[column].tolist()
                    name = f"{record['key'].decode()}.{column.removeprefix('extra.')}"
                    assert bool(offset) == (name in names)
                    if offset:
                        assert data[offset : offset + size] == tar.extractfile(name).read()  # type: ignore[union-attr]


def test_damaged_members_are_slots_of_weight_0(tmp_path):
    """In the shard, and as they were packed: both are counted, and named."""

    def members(number: int) -> dict[str, bytes]:
        return {"txt": b"\xff\xfe" if number == 3 else b"words", "json": b"{" if number == 4 else b"{}"}

    folder = write_set(tmp_path / "set", members)
    tar = folder / "0012.tar"
    content = tar.read_bytes()
    tar.write_bytes(content.replace(b"words", b"sword", 1))  # of sample 12
    found = take(stream(folder, extra={"words": "txt", "boxes": "json"}), 8)
    bad = {sample["key"]: sample for sample in slots(found).values() if sample["weight"] == 0}
    assert set(bad) == {"s003", "s004", "s012"}
    for sample in bad.values():
        assert sample["words"] is None and sample["boxes"] is None and not sample["views"][0].any()
    told = {fault["key"]: (fault["shard"], fault["kind"], fault["reason"]) for b in found for fault in b.faults}
    assert told["s012"] == ("0012.tar", "changed", "its txt: the bytes differ from those that were packed (CRC-32)")
    assert told["s003"][1] == told["s004"][1] == "extra"
    assert "its txt cannot be used: UnicodeDecodeError" in told["s003"][2]
    assert sum(len(batch.faults) for batch in found) == sum(int((batch.weights == 0).sum()) for batch in found)
    assert [b.weights.sum() for b in take(stream(folder), 4)] == [8, 8, 8, 8]  # who asks for less has no fault


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def test_nothing_is_unpickled(tmp_path):
    evil = pickle.dumps(Evil())
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(127) + b"\n"
    for content in (evil, header + evil, b"\x80\x04.", b"", npy(np.array([Evil()], dtype=object))):
        for suffix in ("npy", "png", "emb.npy"):
            with pytest.raises((ValueError, EOFError, OSError)):
                extras.decoded(suffix, content)
    assert extras.decoded("json", b'{"a": [1, null]}') == {"a": [1, None]}


def test_an_array_cannot_ask_for_all_memory():
    whole = npy(np.zeros((3, 4)))
    claims = whole.replace(b"(3, 4), }", b"(3, 4000000000000), }")
    with pytest.raises(ValueError, match="its header claims float64"):
        extras.decoded("npy", claims[: len(whole)])
    for values in (
        np.arange(12).reshape(3, 4),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(5),
        np.zeros(0),
    ):
        found = extras.decoded("npy", npy(values))
        assert np.array_equal(found, values) and found.dtype == values.dtype and found.flags.writeable


def test_a_mask_cannot_ask_for_all_memory(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as programs set it that want large pictures
    bomb = bytearray(png(np.zeros((4, 4), dtype=np.uint8)))
    bomb[16:24] = struct.pack(">II", 14_000, 14_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    with pytest.raises(ValueError, match="claims 14000 x 14000 pixels"):
        extras.decoded("mask.png", bytes(bomb))


def test_masks_keep_their_numbers():
    labels = np.array([[0, 1, 2], [255, 254, 7]], dtype=np.uint8)
    palette = Image.fromarray(labels, "P")
    palette.putpalette([i for colour in range(256) for i in (255 - colour, 3, colour)])
    for image, values in (
        (palette, labels),
        (Image.fromarray(labels), labels),
        (Image.fromarray(labels.astype(np.uint16) * 200), labels.astype(np.int64) * 200),
        (Image.fromarray(labels > 1), labels > 1),
    ):
        file = io.BytesIO()
        image.save(file, "PNG")
        found = extras.decoded("seg.png", file.getvalue())
        assert np.array_equal(found, values) and found.dtype != bool


@pytest.mark.parametrize(
    "wanted, said",
    [
        ({"model": "pkl"}, "members that end in 'pkl' are not read; those that are: txt"),
        ({"a b": "txt"}, "'a b' is no name"),
        ({"views": "txt"}, "'views' is no name"),
        ({"caption": ".txt"}, "'.txt' is no suffix"),
        ({"caption": "../txt"}, "is no suffix"),
    ],
)
def test_what_cannot_be_asked_for(folder, wanted, said):
    with pytest.raises(ValidationError) as caught:
        Data.Config(train=folder, extra=wanted)
    assert said in str(caught.value)


def test_a_set_without_them_says_what_it_has(folder):
    said = r"no sample of .* has a member depth.npy; its samples have json, mask.png, npy, txt"
    with pytest.raises(ValidationError, match="extra: " + said):  # before anything starts, where the set is at hand
        stream(folder, extra={"depth": "depth.npy"})
    with pytest.raises(InputError, match=r"data\.extra: " + said):
        extras.check_present(ShardReader(Manifest.load(folder)), {"depth": "depth.npy"})


def test_show_counts_them(folder, capsys):
    assert main(["shards", "show", str(folder)]) == 0
    said = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    with_caption = sum("caption" in members_of(number) for number in range(TOTAL))
    assert f"with txt {with_caption}" in said and f"with mask.png {TOTAL}" in said


def test_a_mixture_hands_over_those_of_each_set(tmp_path, folder):
    write_set(tmp_path / "more", lambda number: {"json": b"[]"} if number % 2 else {}, total=9)
    sets = {"a": {"set": folder}, "b": {"set": tmp_path / "more"}}
    found = slots(take(stream(sets, extra={"caption": "txt", "boxes": "json"}), 8)).values()
    assert Counter(sample["key"][:2] for sample in found) == {"a/": 32, "b/": 32}
    for sample in found:
        number, known = sample["number"], members_of(sample["number"])
        if sample["key"].startswith("a/"):
            assert (sample["caption"], sample["boxes"]) == (known.get("caption"), known["boxes"])
        else:
            assert (sample["caption"], sample["boxes"]) == (None, [] if number % 2 else None)


def test_indices_without_other_members_are_as_they_were(tmp_path):
    """Byte for byte as an index of fields and key alone."""
    folder = write_set(tmp_path / "set", lambda number: {}, total=6)
    reader = ShardReader(Manifest.load(folder))
    assert reader.names(0) == ("offset", "size", "crc", "id", "label", "width", "height", "key")


def test_an_index_has_columns_for_the_usual_kinds_alone(tmp_path):
    """Kinds that are as many as samples would make an index of their square."""
    folder = write_set(
        tmp_path / "set", lambda number: {"txt": b"a", **{f"part{number}x{i}.txt": b"b" for i in range(8)}}
    )
    names = [name for name in ShardReader(Manifest.load(folder)).names(0) if name.startswith("extra.")]
    assert len(names) == 32 and "extra.txt" in names


def test_members_in_an_object_store_come_with_their_block(folder, tmp_path, monkeypatch):
    """A block of samples begins with its first member, which may lie before the image; each is fetched once."""
    monkeypatch.setattr("penstock.streams.reader.BLOCK", 2)
    wire = Wire(folder=folder)
    try:
        remote = Remote(mode="ranges", cache_dir=tmp_path / "cache")
        images = Images(Manifest.load(wire.url, remote))
        for sample in (2, 3):  # the second block of the first tar
            assert images.load(0, sample).image is not None
            assert same(extras.Extras(images.reader, EXTRA).read(0, sample), {"caption": None} | members_of(sample))
        assert len(wire.gets(r"\.tar")) == 1
        more = {"remote": {"mode": "ranges", "cache_dir": tmp_path / "cache"}}
        away, here = (slots(take(stream(at, extra=EXTRA, **data), 4)) for at, data in ((wire.url, more), (folder, {})))
        assert same(away, here)
        asked = wire.gets(r"\.tar")
        assert len({(path, span) for _, path, span, _ in asked}) == len(asked)
    finally:
        wire.close()
