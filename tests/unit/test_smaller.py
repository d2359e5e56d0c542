"""pack --short-side: what is re-encoded, how near it stays, what is recorded."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from penstock.cli import main
from penstock.streams.decode import DecodeError, decode
from penstock.streams.sets.manifest import Manifest
from penstock.streams.sets.sources.smaller import smaller
from tests.trees import fingerprints, image_bytes, read_plainly


def photo(size: tuple[int, int], kind: str = "JPEG", mode: str = "RGB", orientation: int = 1) -> bytes:
    """Smooth waves, so that any good filter gives nearly the same."""
    x, y = np.meshgrid(np.linspace(0, 9, size[0]), np.linspace(0, 7, size[1]))
    waves = np.stack([np.sin(x + y), np.cos(2 * x), np.sin(x * y / 8)], -1)
    tags, file = Image.Exif(), io.BytesIO()
    tags[0x0112] = orientation
    image = Image.fromarray((127 + 100 * waves).astype(np.uint8)).convert(mode)
    image.save(file, kind, quality=95, exif=tags.tobytes())
    return file.getvalue()


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (130, 97), (1000, 640), (97, 900)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_short_side_and_the_pixels(size, orientation):
    data = photo(size, orientation=orientation)
    shrunk = smaller(data, 96, 90)
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
    height = max(96, round(upright.height * 96 / min(size)))
    width = max(96, round(upright.width * 96 / min(size)))
    with Image.open(io.BytesIO(shrunk)) as image:
        assert (image.size, image.format, image.mode) == ((width, height), "JPEG", "RGB")
        assert image.getexif().get(0x0112, 1) == 1
    expected = np.asarray(upright.resize((width, height), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(decode(shrunk) - expected).mean() < 2.5


@pytest.mark.parametrize("size", [(96, 300), (96, 96), (50, 400)])
def test_images_that_are_no_larger_stay_as_they_are(size):
    for data in (photo(size), photo(size, "PNG"), photo(size, "WEBP")):
        assert smaller(data, 96, 90) == data


def test_other_kinds_and_greyscale():
    assert decode(smaller(photo((400, 300), mode="L"), 96, 90)).shape == (96, 128, 3)
    with Image.open(io.BytesIO(smaller(photo((400, 300), mode="L"), 96, 90))) as image:
        assert image.mode == "L"
    for data in (photo((400, 300), "PNG"), photo((400, 300), "WEBP"), photo((400, 300), mode="CMYK")):
        assert decode(smaller(data, 96, 90)).shape == (96, 128, 3)


def test_an_image_that_does_not_open_is_refused_at_any_size():
    for size in ((400, 300), (90, 80)):
        with pytest.raises(DecodeError):
            smaller(photo(size)[:-300], 96, 90)


def pack(tree: Path, dest: Path, *options: str) -> int:
    return main(["shards", "pack", str(tree), str(dest), "--samples-per-shard", "3", *options])


def test_the_command_records_it_and_goes_on(tmp_path, capsys):
    tree = tmp_path / "tree" / "a"
    tree.mkdir(parents=True)
    for number in range(4):
        (tree / f"{number}.jpg").write_bytes(photo((300 + number, 200)))
    (tree / "small.png").write_bytes(image_bytes(1, "PNG"))
    (tree / "other.bmp").write_bytes(photo((300, 200), "BMP"))
    (tree / "0.txt").write_bytes(b"a caption")
    options = ["--short-side", "64", "--quality", "80", "--extra", "txt"]
    assert pack(tree.parent, tmp_path / "one", *options, "--workers", "1") == 0
    assert pack(tree.parent, tmp_path / "two", *options, "--workers", "2") == 0
    assert fingerprints(tmp_path / "one") == fingerprints(tmp_path / "two")
    settings = Manifest.load(tmp_path / "one").pack["settings"]
    assert settings["short_side"] == 64 and settings["quality"] == 80 and settings["of"] == "Folder"
    samples = read_plainly(tmp_path / "one").values()
    assert sorted(min(decode(s.get("jpg") or s["png"]).shape[:2]) for s in samples) == [16, 64, 64, 64, 64, 64]
    assert [sample["txt"] for sample in samples if "txt" in sample] == [b"a caption"]
    capsys.readouterr()
    assert main(["shards", "show", str(tmp_path / "one")]) == 0
    assert "short side 64, quality 80" in " ".join(capsys.readouterr().out.split())
    assert pack(tree.parent, tmp_path / "one", *options) == 0 and "nothing to do" in capsys.readouterr().out
    assert pack(tree.parent, tmp_path / "one", "--extra", "txt") == 2 and "another plan" in capsys.readouterr().err


def test_a_quality_that_is_none_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        pack(tmp_path, tmp_path / "set", "--short-side", "64", "--quality", "101")
    assert "from 1 to 100" in capsys.readouterr().err
