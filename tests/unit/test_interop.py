"""WebDataset's world: others read our shards, we read theirs. Every sample, each with its own label and members."""

import io
import json
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from penstock.cli import main
from penstock.errors import InputError
from penstock.streams.images import Images
from penstock.streams.sets.foreign import index_folder
from penstock.streams.sets.manifest import Manifest
from tests.shards import number_of, pixels_of, png
from tests.trees import image_bytes, packed, read_plainly

TOTAL, CLASSES = 23, 3
ADDRESS = "shard-{000000..000005}.tar"


def label_of(number: int) -> int:
    return number * 7 % CLASSES


def caption_of(number: int) -> str:
    return f"picture number {number}, größe {number * number}"


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Lossless images that tell their number, with a caption, boxes and a mask beside each."""
    root = tmp_path_factory.mktemp("tree")
    for number in range(TOTAL):
        folder = root / f"class_{label_of(number)}"
        folder.mkdir(exist_ok=True)
        stem = folder / f"image_{number:02d}"
        stem.with_suffix(".png").write_bytes(png(pixels_of(number, 16, 24)))
        stem.with_suffix(".txt").write_text(caption_of(number))
        stem.with_suffix(".json").write_text(json.dumps({"boxes": [[number, 0, 1, 1]]}))
        stem.with_suffix(".mask.png").write_bytes(png(np.full((16, 24), number, dtype=np.uint8)))
    return root


@pytest.fixture(scope="module")
def ours(tree, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ours") / "set"
    manifest = packed(tree, folder, extra=("txt", "json", "mask.png")).manifest
    assert [shard.samples for shard in manifest.shards] == [4, 4, 4, 4, 4, 3]
    return folder


def all_of(folder: Path) -> Iterator[tuple[int, int, str]]:
    """(number in its pixels, label, key) of every sample, as Penstock reads them."""
    manifest = Manifest.load(folder)
    images = Images(manifest)
    for shard, about in enumerate(manifest.shards):
        for place in range(about.samples):
            sample = images.load(shard, place)
            assert sample.image is not None, sample.reason
            yield int(number_of(sample.image.transpose(2, 0, 1))), sample.label, sample.key


# Ours, read by others ------------------------------------------------------------------------


def test_stock_webdataset_decodes_ours(ours):
    import webdataset

    stock = webdataset.WebDataset(str(ours / ADDRESS), shardshuffle=False).decode("rgb8")
    found = {int(number_of(each["png"].transpose(2, 0, 1))): each for each in stock}
    assert sorted(found) == list(range(TOTAL))
    for number, sample in found.items():
        assert sample["cls"] == label_of(number)
        assert sample["txt"] == caption_of(number)
        assert sample["json"] == {"boxes": [[number, 0, 1, 1]]}
        assert (sample["mask.png"] == number).all()
    tuples = webdataset.WebDataset(str(ours / ADDRESS), shardshuffle=False).decode("torchrgb8").to_tuple("png", "cls")
    assert sorted((int(number_of(image)), label) for image, label in tuples) == [
        (number, label_of(number)) for number in range(TOTAL)
    ]


@pytest.mark.parametrize("training", [False, True])
def test_timm_reads_ours_by_its_own_name(ours, training):
    """No patterns, no counts: `_info.json` beside the manifest tells both."""
    from timm.data import create_dataset

    dataset = create_dataset("wds/", root=str(ours), split="train", is_training=training, batch_size=1, seed=0)
    assert len(dataset) == TOTAL
    found = [(int(number_of(np.asarray(image).transpose(2, 0, 1))), label) for image, label in dataset]
    assert sorted(found) == [(number, label_of(number)) for number in range(TOTAL)]


@pytest.mark.parametrize("dest, split", [("in1k-val", "validation"), ("set", "train"), ("test", "test")])
def test_timm_is_told_the_split(tmp_path, dest, split):
    packed("digits:test" if dest == "test" else "digits", tmp_path / dest, limit=8)
    info = json.loads((tmp_path / dest / "_info.json").read_text())
    assert list(info["splits"]) == [split]
    assert sum(info["splits"][split]["shard_lengths"]) == info["splits"][split]["num_samples"] == 8


def test_images_without_labels_are_not_offered_to_timm(tmp_path):
    packed("digits", tmp_path / "set", limit=4, labels=False)
    assert not (tmp_path / "set" / "_info.json").exists()


def open_clip_arguments(address: str, samples: int) -> SimpleNamespace:
    return SimpleNamespace(
        train_data=address,
        val_data=address,
        train_num_samples=samples,
        val_num_samples=samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=1,
        workers=0,
        world_size=1,
    )


@pytest.mark.parametrize("training", [False, True])
def test_open_clip_reads_ours(ours, training, monkeypatch):
    """Its own pipeline, as `open_clip_train.main --dataset-type webdataset` opens it."""
    data = pytest.importorskip("open_clip_train.data")
    # Its grouping wants webdataset <= 0.2.86, without marks between shards (mlfoundations/open_clip issue 935).
    monkeypatch.setattr(data, "tar_file_expander", partial(data.tar_file_expander, eof_value=None))
    opened = data.get_wds_dataset(
        open_clip_arguments(str(ours / ADDRESS), TOTAL),
        lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
        is_train=training,
        tokenizer=lambda text: torch.tensor([[len(text), int(text.split()[2].rstrip(","))]]),
    )
    found = {}
    for images, texts in opened.dataloader:
        assert texts.shape == (1, 2)
        found[int(number_of(images[0]))] = texts[0].tolist()
    assert found == {number: [len(caption_of(number)), number] for number in range(TOTAL)}


# Theirs, read by us --------------------------------------------------------------------------


def indexed(folder: Path, **options: Any) -> Manifest:
    manifest, unreadable = index_folder(folder, workers=1, show=False, **options)
    assert not unreadable
    return manifest


def image(number: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_of(number, 16, 24)).save(file, kind)
    return file.getvalue()


def test_we_read_a_stock_shard_writer(tmp_path):
    """With its own encoders, as its users call it."""
    import webdataset

    with webdataset.ShardWriter(str(tmp_path / "x-%06d.tar"), maxcount=5, verbose=0) as writer:
        for number in range(TOTAL):
            writer.write(
                {
                    "__key__": f"train/{label_of(number)}/{number:04d}",
                    "png": pixels_of(number),
                    "cls": label_of(number),
                    "json": {"number": number},
                    "npy": np.arange(number),
                    "txt": caption_of(number),
                }
            )
    assert indexed(tmp_path).samples == TOTAL
    found = sorted(all_of(tmp_path))
    assert found == [(n, label_of(n), f"train/{label_of(n)}/{n:04d}") for n in range(TOTAL)]


def write_tars(folder: Path, per_tar: int, members: Any, form: int, name: str = "{:05d}.tar") -> None:
    """Tars of `members(number)`, a list of (name, content) for each sample."""
    for first in range(0, TOTAL, per_tar):
        with tarfile.open(folder / name.format(first // per_tar), "w", format=form) as tar:
            for number in range(first, min(first + per_tar, TOTAL)):
                for path, content in members(number):
                    info = tarfile.TarInfo(path)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


FORMS = {"ustar": tarfile.USTAR_FORMAT, "GNU": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
# What public sets look like inside: per style, the members of sample `number`, and whether they have labels.
STYLES: dict[str, Any] = {
    "img2dataset": lambda number: [
        (f"{number:09d}.jpg", image(number)),  # told by its bytes, whatever its name says
        (f"{number:09d}.txt", caption_of(number).encode()),
        (f"{number:09d}.json", json.dumps({"url": "https://a/b.jpg", "caption": caption_of(number)}).encode()),
    ],
    "timm's ImageNet-W21": lambda number: [
        (f"n0{number:07d}_1.jpg", image(number)),
        (f"n0{number:07d}_1.cls", str(label_of(number)).encode()),
        (f"n0{number:07d}_1.json", json.dumps({"filename": "x.JPEG", "label": label_of(number)}).encode()),
    ],
    "label in json": lambda number: [
        (f"a/{number}.jpeg", image(number)),
        (f"a/{number}.json", json.dumps({"label": label_of(number), "text": "x"}).encode()),
    ],
    "CC3M": lambda number: [
        (f"{number // 5:05d}{number:04d}.jpg", image(number)),
        (f"{number // 5:05d}{number:04d}.json", json.dumps({"caption": "x", "key": "1", "exif": "{}"}).encode()),
        (f"{number // 5:05d}{number:04d}.txt", caption_of(number).encode()),
    ],
    "deep folders, capitals": lambda number: [
        (f"./set.v1/train/n{number % 3}/{'long' * 40}{number}.JPEG", image(number)),
        (f"./set.v1/train/n{number % 3}/{'long' * 40}{number}.CLS", f"{label_of(number)}\n".encode()),
    ],
    "boxes in json": lambda number: [
        (f"{number}.webp", image(number)),
        (f"{number}.json", json.dumps([[0, 0, 1, 1]]).encode()),
    ],
}
LABELLED = {"timm's ImageNet-W21", "label in json", "deep folders, capitals"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("style", STYLES)
def test_we_read_theirs(tmp_path, style, form):
    if style.startswith("deep") and form == "ustar":
        pytest.skip("names too long for ustar")
    write_tars(tmp_path, 5, STYLES[style], FORMS[form])
    manifest = indexed(tmp_path)
    assert (manifest.samples, len(manifest.shards)) == (TOTAL, 5)
    found = {number: (label, key) for number, label, key in all_of(tmp_path)}
    plain = read_plainly(tmp_path)  # stock webdataset pairs names as we do
    assert len(found) == len(plain) == TOTAL
    for number, (label, key) in found.items():
        assert label == (label_of(number) if style in LABELLED else -1)
        content = next(plain[key][kind] for kind in ("jpg", "jpeg", "webp") if kind in plain[key])
        assert int(number_of(np.array(Image.open(io.BytesIO(content))).transpose(2, 0, 1))) == number


def test_a_json_with_a_label_of_words_is_named(tmp_path):
    write_tars(tmp_path, 5, lambda n: [(f"{n}.jpg", image(n)), (f"{n}.json", b'{"label": "cat"}')], FORMS["ustar"])
    with pytest.raises(InputError, match=r"0\.json: the label 'cat' is not a class number"):
        indexed(tmp_path)


def test_masks_that_look_like_images_are_named_once(tmp_path, capsys):
    """A second image is ambiguous, so a person says which is not the image; afterwards the manifest knows it."""

    def members(number: int) -> list[tuple[str, bytes]]:
        return [(f"{number}.jpg", image(number)), (f"{number}.mask.png", image(99)), (f"{number}.png", image(98))]

    write_tars(tmp_path, 5, members, FORMS["ustar"])
    assert main(["shards", "index", str(tmp_path), "--workers", "1"]) == 2
    assert "--extra mask.png" in capsys.readouterr().err
    assert main(["shards", "index", str(tmp_path), "--workers", "1", "--extra", "mask.png"]) == 2
    assert "--extra png" in capsys.readouterr().err
    line = ["shards", "index", str(tmp_path), "--workers", "1"]
    assert main([*line, "--extra", "mask.png,png"]) == 0
    assert sorted(number for number, _, _ in all_of(tmp_path)) == list(range(TOTAL))
    before = (tmp_path / "manifest.json").read_bytes()
    assert main(line) == 0
    assert (tmp_path / "manifest.json").read_bytes() == before
    index = tmp_path / Manifest.load(tmp_path).shards[0].index
    index.unlink()  # the tar is whole, so the index can be made again
    assert main(["shards", "verify", str(tmp_path), "--workers", "1"]) == 2
    assert "makes the index again" in " ".join(capsys.readouterr().out.split())
    assert main(line) == 0
    assert main(["shards", "verify", str(tmp_path), "--workers", "1"]) == 0


def test_pack_says_what_has_no_image(tree, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for name, content in {
        "a.jpg": image_bytes(1),
        "a.TXT": b"words",
        "b.txt": b"alone",
        "a.mask.png": image(1),
    }.items():
        (tmp_path / "images" / name).write_bytes(content)
    line = ["shards", "pack", str(tmp_path / "images"), str(tmp_path / "set"), "--extra", "txt,mask.png"]
    assert main([*line, "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "no image of their name: 1 files, as b.txt" in said
    sample = next(iter(read_plainly(tmp_path / "set").values()))
    assert (sample["txt"], sample["jpg"], sample["mask.png"]) == (b"words", image_bytes(1), image(1))
    assert main([*line, "--workers", "1"]) == 0  # nothing is left to do
    (tmp_path / "images" / "a.TXT").unlink()
    assert main(line) == 2
    assert "another plan" in capsys.readouterr().err


def test_members_count_for_the_size_of_shards_and_are_never_made_smaller(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for number in range(12):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(image_bytes(number, size=(96, 64)))
        (tmp_path / "images" / f"{number}.npy").write_bytes(np.lib.format.magic(1, 0) + bytes(20_000))
        (tmp_path / "images" / f"{number}.mask.png").write_bytes(png(pixels_of(number, 64, 96)))
    line = ["shards", "pack", str(tmp_path / "images"), str(tmp_path / "set"), "--extra", "npy,mask.png"]
    assert main([*line, "--shard-size", "100K", "--short-side", "32", "--workers", "1"]) == 0
    assert "stays as it is: npy, mask.png" in capsys.readouterr().out
    manifest = Manifest.load(tmp_path / "set")
    assert len(manifest.shards) == 6 and max(shard.bytes for shard in manifest.shards) < 110_000
    for sample in read_plainly(tmp_path / "set").values():
        assert Image.open(io.BytesIO(sample["jpg"])).size == (48, 32)
        assert Image.open(io.BytesIO(sample["mask.png"])).size == (96, 64) and len(sample["npy"]) == 20_008


@pytest.mark.parametrize("words", ["pkl", "emb.pth", "pkl.gz", "txt,mask.PT.gz.gz", "cls", "../txt", ""])
def test_suffixes_that_cannot_be_taken(tmp_path, words, capsys):
    with pytest.raises(SystemExit):
        main(["shards", "pack", str(tmp_path), str(tmp_path / "set"), "--extra", words])
    assert "--extra" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["digits", "torchvision:CIFAR10"])
def test_sources_without_files_have_nothing_beside_them(tmp_path, source):
    with pytest.raises(InputError, match="--extra takes files"):
        packed(source, tmp_path / "set", extra=("txt",))
