"""Bad input as a person meets it: a command or a run, its exit code, and words that say what to do.

Elsewhere: a recipe with many mistakes (test_recipe), a checkpoint of another run, damaged checkpoints and a full disk
(distributed/test_checkpoint, test_train_stream), every cut and every flipped byte (test_index, test_verify).
"""

import os
import pickle
import struct
import zlib
from pathlib import Path

import pytest

from penstock.augment.crop_flip import CropFlip
from penstock.cli import main
from penstock.errors import DONE, INPUT_WRONG, InputError
from penstock.schedule import Clock
from penstock.streams.data import Data
from penstock.streams.train import TrainStream
from tests.shards import damage, pixels_of, png, write_set
from tests.trees import class_tree, image_bytes, write_tar


def penstock(capsys, *words: str | Path) -> tuple[int, str]:
    """Exit code and all that a command said, on one line."""
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, " ".join((said.out + said.err).split())


def batches(folder: Path, batch: int, steps: int, rank: int = 0, world: int = 1) -> list:
    stream = TrainStream(
        Data.Config(train=folder, workers=0),
        CropFlip(CropFlip.Config(size=8)),
        batch=batch,
        accumulation=1,
        rank=rank,
        world=world,
        seed=0,
        clock=Clock(steps, batch, batch),
        device_type="cpu",
    )
    endless = stream.batches(0, 0)
    return [next(endless) for _ in range(steps)]


@pytest.mark.parametrize(
    "words", [["pack", "FOLDER", "DEST"], ["index", "FOLDER"], ["verify", "FOLDER"], ["show", "FOLDER"]]
)
def test_an_empty_folder(tmp_path, capsys, words):
    empty = tmp_path / "empty"
    empty.mkdir()
    names = {"FOLDER": empty, "DEST": tmp_path / "set"}
    code, said = penstock(capsys, "shards", *(names.get(word, word) for word in words))
    assert code == INPUT_WRONG and "empty" in said
    assert "penstock shards pack" in said or "holds no images" in said
    assert list(empty.iterdir()) == [] and not (tmp_path / "set").exists()


def test_a_shard_cut_in_half(tmp_path, capsys):
    manifest = write_set(tmp_path, [8, 8])
    shard = tmp_path / manifest.shards[1].name
    os.truncate(shard, shard.stat().st_size // 2)
    code, said = penstock(capsys, "shards", "verify", tmp_path)
    assert code == INPUT_WRONG and shard.name in said and "sample000015" in said
    assert manifest.shards[0].name not in said.replace(shard.name, "")
    with pytest.raises(InputError, match=r"shard-000001\.tar has .* bytes instead of .*Copy the files again"):
        batches(tmp_path, 16, 1)


def test_a_flipped_byte(tmp_path, capsys):
    manifest = write_set(tmp_path, [8])
    assert penstock(capsys, "shards", "verify", tmp_path)[0] == DONE
    key = damage(manifest, 5)
    code, said = penstock(capsys, "shards", "verify", tmp_path)
    assert code == INPUT_WRONG and key in said
    (batch,) = batches(tmp_path, 8, 1)
    assert [fault["key"] for fault in batch.faults] == [key]
    assert {k: float(w) for k, w in zip(batch.keys, batch.weights, strict=True) if w == 0} == {key: 0.0}


def test_more_ranks_than_samples(tmp_path):
    """Each rank has its share of every step, whatever the set holds: here each image is served twice a step."""
    write_set(tmp_path, [2])
    keys = [key for rank in range(4) for batch in batches(tmp_path, 4, 3, rank, 4) for key in batch.keys]
    assert sorted(keys) == ["sample000000"] * 6 + ["sample000001"] * 6


def huge(kind: str) -> bytes:
    """An image whose header says 50,000 x 50,000 pixels: 7.5 GB when decoded."""
    if kind == "png":
        data = bytearray(png(pixels_of(0)))
        data[16:24] = struct.pack(">II", 50_000, 50_000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        return bytes(data)
    data = bytearray(image_bytes(1))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", 50_000, 50_000)
    return bytes(data)


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_an_image_of_2_gigapixels_by_its_header(tmp_path, capsys, kind):
    tree = class_tree(tmp_path / "tree", classes=2, each=3)
    (tree / "class_0" / f"huge.{kind}").write_bytes(huge(kind))
    code, said = penstock(capsys, "shards", "pack", tree, tmp_path / "set", "--workers", "1")
    assert code == INPUT_WRONG and f"huge.{kind}" in said and "50" in said
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", [("good.jpg", image_bytes(2)), (f"huge.{kind}", huge(kind))])
    penstock(capsys, "shards", "index", tmp_path / "tars")
    (batch,) = batches(tmp_path / "tars", 2, 1)
    assert [fault["key"] for fault in batch.faults] == ["huge"] and "50" in batch.faults[0]["reason"]


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["PENSTOCK_TRAP"],)


@pytest.mark.parametrize("name", ["a.pkl", "a.pickle", "a.pth", "a.jpg", "a.json", "a.cls"])
def test_a_pickle_inside_a_shard_is_never_opened(tmp_path, capsys, monkeypatch, name):
    """By its own name it is refused; under another it is an image, or a label, that cannot be read."""
    trap = tmp_path / "sprung"
    monkeypatch.setenv("PENSTOCK_TRAP", str(trap))
    folder = tmp_path / "set"
    folder.mkdir()
    image = [] if name == "a.jpg" else [("a.jpg", image_bytes(0))]
    write_tar(folder / "x.tar", [*image, (name, pickle.dumps(Trap())), ("b.jpg", image_bytes(1))])
    code, said = penstock(capsys, "shards", "index", folder)
    if name == "a.jpg":
        assert "x.tar: a" in said
        (batch,) = batches(folder, 2, 1)
        assert [fault["key"] for fault in batch.faults] == ["a"]
    else:
        assert code == INPUT_WRONG and name in said
    assert not trap.exists()
