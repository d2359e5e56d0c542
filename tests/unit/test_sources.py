"""Where images come from: folders, Parquet as Hugging Face writes it, torchvision, digits."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from penstock.errors import InputError
from penstock.streams.sets.sources import Options, open_source
from tests.trees import class_tree, fingerprints, image_bytes, packed, read_plainly


def test_flat_folder_has_no_labels(tmp_path):
    (tmp_path / "flat").mkdir()
    for number in range(5):
        (tmp_path / "flat" / f"{number}.jpg").write_bytes(image_bytes(number))
    manifest = packed(tmp_path / "flat", tmp_path / "set").manifest
    assert (manifest.classes, manifest.class_counts, manifest.unlabelled) == (None, {}, 5)
    assert all("cls" not in sample for sample in read_plainly(tmp_path / "set").values())


def test_other_kinds_become_png_and_known_ones_stay(tmp_path):
    folder = tmp_path / "tree"
    folder.mkdir()
    kept = {
        "jpg": image_bytes(1),
        "png": image_bytes(2, "PNG", mode="RGBA"),
        "webp": image_bytes(3, "WEBP"),
    }
    for kind, data in kept.items():
        (folder / f"kept.{kind}").write_bytes(data)
    (folder / "misnamed.png").write_bytes(image_bytes(4))  # a JPEG; the bytes tell
    (folder / "a.bmp").write_bytes(image_bytes(5, "BMP"))
    (folder / "b.tif").write_bytes(image_bytes(6, "TIFF", mode="CMYK"))
    (folder / "c.gif").write_bytes(image_bytes(7, "GIF"))
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.jpg").write_text("not looked at")
    done = packed(folder, tmp_path / "set", shard_samples=100)
    assert any("1 files .txt" in remark for remark in done.remarks)
    found = {key.split("-", 1)[1]: sample for key, sample in read_plainly(tmp_path / "set").items()}
    assert found["misnamed"]["jpg"] == image_bytes(4)
    for name, original in (("a", "a.bmp"), ("c", "c.gif")):
        with Image.open(io.BytesIO(found[name]["png"])) as stored, Image.open(folder / original) as given:
            assert np.array_equal(np.asarray(stored.convert("RGB")), np.asarray(given.convert("RGB")))
    with Image.open(io.BytesIO(found["b"]["png"])) as stored:
        assert stored.mode == "RGB"
    for key, sample in read_plainly(tmp_path / "set").items():
        if "kept" in key:
            kind = next(kind for kind in kept if kind in sample)
            assert sample[kind] == kept[kind]


def test_names_that_would_collide_or_end_a_key(tmp_path):
    """Dots end a webdataset key, and one name may have two types: all are samples of their own here."""
    folder = tmp_path / "tree" / "n.01"
    folder.mkdir(parents=True)
    names = ["a.v1.jpg", "a.v2.jpg", "a.jpg", "a.jpeg", "ü ß.jpg", "x" * 200 + ".jpg", "__meta__.jpg"]
    for number, name in enumerate(names):
        (folder / name).write_bytes(image_bytes(number))
    packed(tmp_path / "tree", tmp_path / "set")
    stored = {sample["jpg"] for sample in read_plainly(tmp_path / "set").values()}
    assert stored == {image_bytes(number) for number in range(len(names))}


def test_no_outside_program_is_started_for_a_file(tmp_path):
    """Pillow gives PostScript to Ghostscript; a file may hold it under any name."""
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "a.bmp").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(InputError, match=r"a\.bmp: not an image of a known kind"):
        packed(folder, tmp_path / "set")


@pytest.mark.parametrize("case", ["empty", "text", "mixed", "splits", "loop"])
def test_folders_that_cannot_work(tmp_path, case):
    folder = tmp_path / "tree"
    folder.mkdir()
    if case == "text":
        (folder / "a.txt").write_text("x")
    if case in ("mixed", "loop"):
        class_tree(folder)
    if case == "mixed":
        (folder / "top.jpg").write_bytes(image_bytes(1))
    if case == "splits":
        class_tree(folder / "train")
        class_tree(folder / "val")
    if case == "loop":
        (folder / "class_0" / "again").symlink_to(folder / "class_0")
    said = {
        "empty": "holds no images",
        "text": r"holds no images \(1 files \.txt\)",
        "mixed": "both folders and images",
        "splits": "--split train",
        "loop": "a folder around itself",
    }
    with pytest.raises(InputError, match=said[case]):
        packed(folder, tmp_path / "set")
    if case == "mixed":
        assert packed(folder, tmp_path / "all", labels=False).manifest.unlabelled == 22
    if case == "splits":
        assert packed(folder, tmp_path / "train", split="train").manifest.samples == 21


def test_class_without_images_keeps_its_number(tmp_path):
    tree = class_tree(tmp_path / "tree")
    (tree / "class_05").mkdir()
    done = packed(tree, tmp_path / "set")
    assert done.manifest.classes == ("class_0", "class_05", "class_1", "class_2")
    assert done.manifest.class_counts == {0: 7, 2: 7, 3: 7}
    assert any("class_05" in remark for remark in done.remarks)


def hugging_face(rows: int, struct: bool = True) -> pa.Table:
    """A table as `datasets` writes it, made from its format's description."""
    images = [{"bytes": image_bytes(row), "path": f"{row}.jpg"} if struct else image_bytes(row) for row in range(rows)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    features = {
        "image": {"_type": "Image"},
        "label": {"names": ["owl", "cat", "dog"], "_type": "ClassLabel"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    fields = [pa.field("image", kind), pa.field("label", pa.int64()), pa.field("width", pa.int32())]
    columns = [images, [row % 3 for row in range(rows)], [24] * rows]
    return pa.table(columns, schema=pa.schema(fields, metadata=metadata))


def test_parquet_as_hugging_face_stores_it(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    table = hugging_face(50)
    pq.write_table(table.slice(0, 30), folder / "train-00000-of-00002.parquet", row_group_size=7)
    pq.write_table(table.slice(30), folder / "train-00001-of-00002.parquet", row_group_size=7)
    pq.write_table(hugging_face(3), folder / "test-00000-of-00001.parquet")
    with pytest.raises(InputError, match="splits test, train"):
        packed(folder, tmp_path / "both")
    manifest = packed(folder, tmp_path / "set", split="train", shard_samples=13).manifest
    assert manifest.classes == ("owl", "cat", "dog")
    plain = read_plainly(tmp_path / "set")
    expected = {image_bytes(row): row % 3 for row in range(50)}
    assert {sample["jpg"]: int(sample["cls"]) for sample in plain.values()} == expected
    packed(folder, tmp_path / "again", split="train", shard_samples=13, workers=2)
    assert fingerprints(tmp_path / "again") == fingerprints(tmp_path / "set")
    assert packed(folder / "test-00000-of-00001.parquet", tmp_path / "one").manifest.samples == 3


def test_parquet_columns(tmp_path):
    path = tmp_path / "a.parquet"
    table = hugging_face(4, struct=False)
    pq.write_table(table.drop_columns(["label"]), path)
    assert packed(path, tmp_path / "unlabelled").manifest.unlabelled == 4
    twice = table.append_column("mask", table["image"]).rename_columns(["left", "fine", "coarse", "right"])
    pq.write_table(twice, path)
    with pytest.raises(InputError, match=r"several columns of bytes.*--image-column"):
        packed(path, tmp_path / "x")
    with pytest.raises(InputError, match="no image column 'rigt'; did you mean 'right'"):
        packed(path, tmp_path / "x", image_column="rigt")
    done = packed(path, tmp_path / "chosen", image_column="right", label_column="fine")
    assert done.manifest.class_counts == {0: 2, 1: 1, 2: 1}
    pq.write_table(table.set_column(1, "label", pa.array(["owl"] * 4)), path)
    with pytest.raises(InputError, match="does not hold class numbers but string"):
        packed(path, tmp_path / "x")
    pq.write_table(pa.table({"image": pa.array([image_bytes(1), None])}), path)
    with pytest.raises(InputError, match="the row holds no image bytes"):
        packed(path, tmp_path / "null")
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        packed(path, tmp_path / "x")


def test_torchvision(tmp_path):
    from torchvision.datasets import MNIST

    with pytest.raises(InputError, match=r"'MNITS'; did you mean '.*MNIST'"):
        open_source("torchvision:MNITS", Options(root=tmp_path))
    with pytest.raises(InputError, match=r"cannot be opened.*--download"):
        open_source("torchvision:MNIST:train", Options(root=tmp_path))
    with pytest.raises(InputError, match="disagree"):
        open_source("torchvision:MNIST:train", Options(root=tmp_path, split="test"))
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    for images, labels in (MNIST.resources[0:2], MNIST.resources[2:4]):
        (raw / images[0][:-3]).write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 6, 0, 0, 0, 28, 0, 0, 0, 28]) + pixels.tobytes())
        (raw / labels[0][:-3]).write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 6]) + bytes(range(6)))
    manifest = packed("torchvision:MNIST:test", tmp_path / "set", root=tmp_path).manifest
    assert manifest.classes is not None
    assert manifest.classes[3] == "3 - three"
    for sample in read_plainly(tmp_path / "set").values():
        with Image.open(io.BytesIO(sample["png"])) as stored:
            assert np.array_equal(np.asarray(stored), pixels[int(sample["cls"])])


def test_digits(tmp_path):
    from sklearn.datasets import load_digits

    train = packed("digits", tmp_path / "train", shard_samples=10_000).manifest
    test = packed("digits:test", tmp_path / "test", shard_samples=10_000, size=8).manifest
    assert train.samples + test.samples == 1797
    for label, count in train.class_counts.items():
        assert count / (count + test.class_counts[label]) == pytest.approx(0.8, abs=0.01)
    bunch = load_digits()
    seen = set()
    for folder, side in (("train", 16), ("test", 8)):
        for key, sample in read_plainly(tmp_path / folder).items():
            number = int(key.rsplit("-", 1)[1])
            assert number not in seen
            seen.add(number)
            assert int(sample["cls"]) == bunch.target[number]
            with Image.open(io.BytesIO(sample["png"])) as image:
                assert (image.mode, image.size) == ("RGB", (side, side))
                if side == 8:
                    grey = np.asarray(image)[..., 0] * (16 / 255)
                    assert np.abs(grey - bunch.images[number]).max() < 0.04
    assert seen == set(range(1797))
    with pytest.raises(InputError, match="no split 'tests'; did you mean 'test'"):
        packed("digits:tests", tmp_path / "x")
