"""Tars made elsewhere: what is read, and that nothing is misread without a word."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from penstock.errors import InputError
from penstock.streams.sets.foreign import index_folder
from penstock.streams.sets.manifest import Manifest
from penstock.streams.sets.show import print_summary
from penstock.streams.sets.verify import verify
from tests.trees import fingerprints, image_bytes, read_plainly, write_tar

JPG = image_bytes(1)


def test_formats_labels_and_names(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [
            ("cat/x1.JPG", JPG),
            ("cat/x1.cls", b"1\n"),
            ("x2.png", image_bytes(2, "PNG", mode="L")),
            ("x2.json", b'{"label": 0, "caption": "a dog"}'),
            ("x3.json", b'{"caption": "no label"}'),
            ("x3.webp", image_bytes(3, "WEBP")),
            ("__meta__", b"{}"),
        ],
    )
    write_tar(tmp_path / "b.tar", [("y1.jpeg", image_bytes(4)), ("y1.txt", b"words")])
    (tmp_path / "classes.json").write_text('{"dog": 0, "cat": 1}')
    manifest, unreadable = index_folder(tmp_path, workers=1, show=False)
    assert not unreadable
    assert manifest == Manifest.load(tmp_path)
    assert manifest.classes == ("dog", "cat")
    assert (manifest.class_counts, manifest.unlabelled) == ({0: 1, 1: 1}, 2)
    records = np.load(tmp_path / "a.index.npy")
    assert records["key"].tolist() == [b"cat/x1", b"x2", b"x3"]
    assert records["label"].tolist() == [1, 0, -1]
    assert set(read_plainly(tmp_path)) == {"cat/x1", "x2", "x3", "y1"}
    data = (tmp_path / "a.tar").read_bytes()
    first = records[0]
    assert data[first["offset"] : first["offset"] + first["size"]] == JPG


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


REFUSED: dict[str, tuple[list, str]] = {
    "dotted keys that collide": ([("img.001.jpg", JPG), ("img.002.jpg", JPG)], r"dot within its name.*'img'"),
    "one dotted key": ([("img.v2.jpg", JPG)], r"img\.v2\.jpg has a dot"),
    "same member twice": ([("a.jpg", JPG), ("a.jpg", JPG)], "two members of type jpg"),
    "same member in another case": ([("a.jpg", JPG), ("a.JPG", JPG)], "two members of type jpg"),
    "two images": ([("a.jpg", JPG), ("a.png", JPG)], r"two images, a\.jpg and a\.png"),
    "interleaved": ([("a.jpg", JPG), ("b.jpg", JPG), ("a.cls", b"1")], r"a\.cls: other samples lie between"),
    "no image": ([("a.jpg", JPG), ("b.cls", b"1")], "sample b has no image"),
    "no extension": ([("README", b"x")], "no key and extension"),
    "a pickle": ([("a.jpg", JPG), ("a.pkl", pickle.dumps(1))], r"a\.pkl is a pickle"),
    "pyd": ([("a.jpg", JPG), ("a.PYD", b"")], "is a pickle"),
    "pth": ([("a.jpg", JPG), ("a.emb.pth", b"")], "is a pickle"),
    "parent folder": ([("../a.jpg", JPG)], "leaves the folder"),
    "absolute": ([("/a.jpg", JPG)], "leaves the folder"),
    "symbolic link": ([link("a.jpg", tarfile.SYMTYPE)], "symbolic link"),
    "hard link": ([link("a.jpg", tarfile.LNKTYPE)], "hard link"),
    "label of letters": ([("a.jpg", JPG), ("a.cls", b"cat")], r"a\.cls: the label b'cat' is not"),
    "label below none": ([("a.jpg", JPG), ("a.cls", b"-2")], "not a class number"),
    "label true": ([("a.jpg", JPG), ("a.json", b'{"label": true}')], "not a class number"),
    "label too deep": ([("a.jpg", JPG), ("a.json", b"[" * 100_000)], "not a class number"),
    "nothing": ([], "hold no samples"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    members, said = REFUSED[name]
    write_tar(tmp_path / "part-7.tar", members)
    with pytest.raises(InputError, match=said) as caught:
        index_folder(tmp_path, workers=1, show=False)
    assert "part-7.tar" in str(caught.value) or name == "nothing"
    assert not (tmp_path / "manifest.json").exists()


LONG = "deep/" + "n" * 150


def image_folder(root: Path) -> dict[str, bytes]:
    """Pairs of image and label in nested folders, with long names and names that are not ASCII, by path."""
    files = {}
    for number, name in enumerate(["n01/a", "n01/b", f"n02/{LONG}", "n02/vögel 東京", "n02/z"]):
        files[f"{name}.jpg"], files[f"{name}.cls"] = image_bytes(number), str(number % 2).encode()
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return files


def by_tarfile(source: Path, target: Path, form: int) -> None:
    with tarfile.open(target, "w", format=form) as tar:
        tar.add(source, arcname=".")


def by_gnu_tar(source: Path, target: Path, *options: str) -> None:
    subprocess.run(["tar", *options, "-cf", target, "--sort=name", source.name], cwd=source.parent, check=True)


WAYS = {
    "tarfile.add": lambda source, target: by_tarfile(source, target, tarfile.DEFAULT_FORMAT),
    "tarfile.add, GNU": lambda source, target: by_tarfile(source, target, tarfile.GNU_FORMAT),
    "tar": lambda source, target: by_gnu_tar(source, target),
    "tar --format=pax": lambda source, target: by_gnu_tar(source, target, "--format=pax"),
    "tar --format=pax, a comment": lambda source, target: by_gnu_tar(
        source, target, "--format=pax", "--pax-option=comment=hello"
    ),
    "tar --format=gnu": lambda source, target: by_gnu_tar(source, target, "--format=gnu"),
}


@pytest.mark.parametrize("way", WAYS)
def test_tars_of_folders_as_people_make_them(tmp_path, way):
    if way.startswith("tar ") and not shutil.which("tar"):
        pytest.skip("no tar command here")
    files = image_folder(tmp_path / "images")
    (tmp_path / "set").mkdir()
    WAYS[way](tmp_path / "images", tmp_path / "set" / "x.tar")
    manifest, unreadable = index_folder(tmp_path / "set", workers=1, show=False)
    assert (manifest.samples, unreadable) == (5, [])
    data = (tmp_path / "set" / "x.tar").read_bytes()
    plain = read_plainly(tmp_path / "set")
    records = np.load(tmp_path / "set" / "x.index.npy")
    assert {record["key"].decode() for record in records} == set(plain)
    for record in records:
        key = record["key"].decode()
        name = key.removeprefix("./").removeprefix("images/")
        image = data[record["offset"] : record["offset"] + record["size"]]
        assert image == plain[key]["jpg"] == files[f"{name}.jpg"]
        assert str(record["label"]).encode() == files[f"{name}.cls"]


@pytest.mark.parametrize("way", ["tarfile.add", "tarfile.add, GNU"])
def test_verify_names_damage_between_folders_and_long_names(tmp_path, way):
    """Every byte of the tar that is flipped is noticed, wherever it lies among the headers."""
    image_folder(tmp_path / "images")
    folder = tmp_path / "set"
    folder.mkdir()
    WAYS[way](tmp_path / "images", folder / "x.tar")
    manifest, _ = index_folder(folder, workers=1, show=False)
    assert verify(manifest, decode_images=False, show=False) == []
    whole = (folder / "x.tar").read_bytes()
    for place in range(100, len(whole), 1021):
        broken = bytearray(whole)
        broken[place] ^= 0x55
        (folder / "x.tar").write_bytes(broken)
        found = verify(manifest, decode_images=False, show=False)
        assert found and found[0].file == "x.tar", place
    (folder / "x.tar").write_bytes(whole[: len(whole) // 2])
    assert "cut" in str(verify(manifest, decode_images=False, show=False))


def with_pax(**records: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo("a.jpg")
    info.size, info.pax_headers = len(JPG), records
    return info


@pytest.mark.parametrize(
    "records,says",
    [
        ({"size": "5"}, r"has \d+ bytes by its header and 5 by its pax header"),
        ({"path": "../a.jpg"}, "leaves the folder"),
        ({"path": "a.pkl"}, "is a pickle"),
        ({"GNU.sparse.major": "1"}, r"says 'GNU\.sparse\.major'"),
        ({"hdrcharset": "BINARY"}, "says 'hdrcharset'"),
    ],
)
def test_pax_headers_that_change_what_is_read_are_refused(tmp_path, records, says):
    info = with_pax(**records)
    blocks = info.create_pax_header(info.get_info(), "utf-8")
    (tmp_path / "p.tar").write_bytes(blocks + JPG + b"\0" * (-len(JPG) % 512) + b"\0" * 1024)
    with pytest.raises(InputError, match=says):
        index_folder(tmp_path, workers=1, show=False)


def test_a_pax_record_longer_than_its_header_is_refused(tmp_path):
    """Python's reader takes the name's line end for a part of the name then."""
    info = with_pax(path="b" * 150 + ".jpg")
    blocks = info.create_pax_header(info.get_info(), "utf-8")
    assert b"\x00164 path=" in blocks
    blocks = blocks.replace(b"\x00164 path=", b"\x00964 path=")
    (tmp_path / "p.tar").write_bytes(blocks + JPG + b"\0" * (-len(JPG) % 512) + b"\0" * 1024)
    with pytest.raises(InputError, match="damaged pax header"):
        index_folder(tmp_path, workers=1, show=False)


def test_harmless_pax_headers_are_passed_over(tmp_path):
    info = with_pax(mtime="1.5", atime="2.5", ctime="3.5", uname="ü", comment="c", **{"SCHILY.xattr.user.x": "y"})
    blocks = info.create_pax_header(info.get_info(), "utf-8")
    whole = tarfile.TarInfo.create_pax_global_header({"comment": "all"})
    (tmp_path / "p.tar").write_bytes(whole + blocks + JPG + b"\0" * (-len(JPG) % 512) + b"\0" * 1024)
    assert index_folder(tmp_path, workers=1, show=False)[0].samples == 1
    whole = tarfile.TarInfo.create_pax_global_header({"path": "b.jpg"})
    (tmp_path / "p.tar").write_bytes(whole + blocks + JPG + b"\0" * (-len(JPG) % 512) + b"\0" * 1024)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InputError, match="global pax header"):
        index_folder(tmp_path, workers=1, show=False)


def test_member_above_8_gigabytes(tmp_path):
    """Its size is no octal number; the file itself is sparse, so that the test writes next to nothing."""
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 << 30
    path = tmp_path / "big.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 512 + info.size + 1024)
    with pytest.raises(InputError, match=r"big\.tar.*big\.jpg has 9,663,676,416 bytes"):
        index_folder(tmp_path, workers=1, show=False)


def test_keys_must_differ_across_shards(tmp_path):
    write_tar(tmp_path / "a.tar", [("x.jpg", JPG), ("twin.jpg", JPG)])
    write_tar(tmp_path / "b.tar", [("twin.jpg", image_bytes(2))])
    with pytest.raises(InputError, match=r"twin in a\.tar, twin in b\.tar"):
        index_folder(tmp_path, workers=1, show=False)


def test_every_cut_is_noticed(tmp_path):
    """A shard of three samples cut at every block: webdataset shortens most of these without a word."""
    members = [(f"s{i}.{kind}", image_bytes(i) if kind == "jpg" else b"1") for i in range(3) for kind in ("cls", "jpg")]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    end = whole.rstrip(b"\0")
    end_of_data = -(-len(end) // 512) * 512
    path = tmp_path / "cut" / "a.tar"
    path.parent.mkdir()
    for length in [*range(0, end_of_data + 1024, 512), *range(100, end_of_data, 777)]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"a\.tar"):
            index_folder(path.parent, workers=1, show=False)
    path.write_bytes(whole[: end_of_data + 1024])  # the end mark alone, without tar's filling: a whole archive
    assert index_folder(path.parent, workers=1, show=False)[0].samples == 3


def test_damaged_and_doubled_tars(tmp_path):
    members = [(f"s{i}.jpg", image_bytes(i)) for i in range(3)]
    whole = write_tar(tmp_path / "a.tar", members).read_bytes()
    second = whole.index(b"s1.jpg")
    for byte in (0, 30, 130, 150, 156, 257, 300, 511):
        damaged = bytearray(whole)
        damaged[second + byte] ^= 0x10
        (tmp_path / "a.tar").write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.tar, byte .*damaged header after s0\.jpg"):
            index_folder(tmp_path, workers=1, show=False)
    (tmp_path / "a.tar").write_bytes(whole + whole)
    with pytest.raises(InputError, match="followed by more data"):
        index_folder(tmp_path, workers=1, show=False)
    (tmp_path / "a.tar").write_bytes(os.urandom(20480))
    with pytest.raises(InputError, match="damaged header"):
        index_folder(tmp_path, workers=1, show=False)


def test_folders_that_cannot_work(tmp_path):
    with pytest.raises(InputError, match=r"no \.tar files"):
        index_folder(tmp_path, workers=1, show=False)
    with pytest.raises(InputError, match="is not a folder"):
        index_folder(tmp_path / "nothing", workers=1, show=False)
    (tmp_path / "a.tgz").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.tgz; compressed"):
        index_folder(tmp_path, workers=1, show=False)


def test_too_few_names_and_unreadable_header(tmp_path):
    write_tar(
        tmp_path / "a.tar", [("a.jpg", JPG), ("a.cls", b"2"), ("b.jpg", pickle.dumps("no image")), ("b.cls", b"0")]
    )
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    with pytest.raises(InputError, match="label 2 but only 2 class names"):
        index_folder(tmp_path, workers=1, show=False)
    (tmp_path / "classes.txt").write_text("dog\ncat\nowl\n")
    manifest, unreadable = index_folder(tmp_path, workers=1, show=False)
    assert unreadable == ["a.tar: b"]
    assert np.load(tmp_path / "a.index.npy")["width"].tolist() == [24, 0]
    (tmp_path / "classes.txt").unlink()
    assert index_folder(tmp_path, workers=1, show=False)[0] == manifest  # indexed again, names are kept


def test_a_changed_tar_is_not_blessed(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.jpg", JPG)])
    index_folder(tmp_path, workers=1, show=False)
    write_tar(tmp_path / "a.tar", [("a.jpg", image_bytes(9))])
    with pytest.raises(InputError, match="changed since"):
        index_folder(tmp_path, workers=1, show=False)


def test_two_at_once_give_one_valid_set(tmp_path):
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", [(f"s{number}-{i}.jpg", image_bytes(i)) for i in range(20)])
    line = [sys.executable, "-m", "penstock.cli", "shards", "index", str(tmp_path), "--workers", "1"]
    both = [subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    after = fingerprints(tmp_path)
    assert Manifest.load(tmp_path).samples == 80
    assert len(after) == 9  # no drafts are left
    index_folder(tmp_path, workers=1, show=False)
    assert fingerprints(tmp_path) == after


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda content: content.update(samples=3), "changed after it was written"),
        (lambda content: content["shards"][0].update(name="../a.tar"), "changed after it was written"),
        (lambda content: content.update(version=9), "version 9"),
        (lambda content: content.pop("shards"), "not a manifest"),
        (lambda content: content["shards"][0].pop("sha256"), "not a manifest"),
    ],
)
def test_changed_manifest(tmp_path, change, said):
    write_tar(tmp_path / "a.tar", [("a.jpg", JPG)])
    index_folder(tmp_path, workers=1, show=False)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=said):
        Manifest.load(tmp_path)


def test_manifest_that_leaves_its_folder(tmp_path):
    """A manifest whose own checksum is right, written to make a reader open other files."""
    write_tar(tmp_path / "a.tar", [("a.jpg", JPG)])
    manifest, _ = index_folder(tmp_path, workers=1, show=False)
    for name in ("../a.tar", "/etc/passwd", "pipe:rm -r x", "https://a/b.tar", "a\\b.tar", ""):
        replace(manifest, shards=(replace(manifest.shards[0], name=name),)).save(tmp_path)
        with pytest.raises(InputError, match="outside its folder"):
            Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"class_counts": {2: 1}}, "it counts samples of label 2, and names 2 classes"),
        ({"class_counts": {0: 1}, "classes": ()}, "it counts samples of label 0, and names 0 classes"),
        ({"shards": (), "samples": 0, "class_counts": {}}, "it holds no sample"),
        ({"pack": {"settings": 5}}, "`pack` does not say how"),
        ({"pack": {"extra": 7}}, "`extra` of `pack` is no list"),
        ({"pack": {"extra": "txt"}}, "`extra` of `pack` is no list"),
        ({"pack": {"extra": [1]}}, "`extra` of `pack` is no list"),
    ],
)
def test_manifest_that_says_what_cannot_be(tmp_path, change, said):
    """With a checksum that is right."""
    write_tar(tmp_path / "a.tar", [("a.jpg", JPG), ("a.cls", b"1")])
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    manifest, _ = index_folder(tmp_path, workers=1, show=False)
    replace(manifest, **change).save(tmp_path)
    with pytest.raises(InputError, match=said):
        Manifest.load(tmp_path)


def test_settings_without_a_quality_are_shown(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [("a.jpg", JPG)])
    manifest, _ = index_folder(tmp_path, workers=1, show=False)
    replace(manifest, pack={"settings": {"short_side": 3}}).save(tmp_path)
    print_summary(Manifest.load(tmp_path))
    assert "short side 3, quality unknown" in capsys.readouterr().out


def test_diff_in_words_and_missing_files(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.jpg", JPG), ("a.cls", b"0")])
    write_tar(tmp_path / "b.tar", [("b.jpg", JPG)])
    before, _ = index_folder(tmp_path, workers=1, show=False)
    assert before.diff(before) == []
    (tmp_path / "manifest.json").unlink()
    write_tar(tmp_path / "b.tar", [("c.jpg", JPG), ("c.cls", b"4")])
    after, _ = index_folder(tmp_path, workers=1, show=False)
    assert after.identity != before.identity
    assert after.diff(before) == [
        "1 samples of class 4 instead of 0",
        "other sample keys",
        "shard b.tar has other content",
    ]
    (tmp_path / "a.index.npy").unlink()
    os.truncate(tmp_path / "b.tar", 1024)
    with pytest.raises(InputError, match=r"a\.index\.npy is missing; b\.tar has 1,024 bytes"):
        after.check_files()
    with pytest.raises(InputError, match=r"no manifest.*penstock shards pack"):
        Manifest.load(tmp_path.parent)


def test_manifests_and_commands_need_no_torch():
    code = (
        "import sys, penstock.streams.sets.manifest, penstock.streams.sets.commands; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
