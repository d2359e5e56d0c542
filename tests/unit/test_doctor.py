"""`penstock shards doctor`: what it counts is right, and its advice follows from what it measured."""

import io
import weakref

import numpy as np
import pytest
from PIL import Image

from penstock.cli import main
from penstock.errors import DONE, INPUT_WRONG
from penstock.streams import doctor
from penstock.streams.doctor import Findings, examine, report
from penstock.streams.reader import ShardReader
from tests.shards import damage, png, write_set


def photograph(number: int, size: tuple[int, int] = (640, 480)) -> bytes:
    """A JPEG with some detail; `size` is (width, height)."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
    return file.getvalue()


def test_counts_what_is_there(tmp_path):
    small = png(np.zeros((60, 90, 3), dtype=np.uint8))
    manifest = write_set(tmp_path, [12], content=lambda n: small if n % 3 == 0 else photograph(n), suffix="jpg")
    damage(manifest, 4)
    found = examine(str(tmp_path), 32, 0.1)
    assert (found.samples, found.shards) == (12, 1)
    assert found.measured == 12
    assert found.kinds == {"jpg": 7, "png": 4}  # the damaged one is none that is known
    assert found.unreadable == {"changed": 1}
    assert set(found.plans) == {"pillow (not a JPEG: whole)", *(plan for plan in found.plans if "simplejpeg" in plan)}
    assert sum(count for plan, count in found.plans.items() if plan.startswith("simplejpeg (1/")) == 7
    assert sorted(found.sides) == [(60, 90)] * 4 + [(480, 640)] * 7
    sizes = [record["size"] for record in np.load(tmp_path / manifest.shards[0].index)]
    assert min(sizes) < found.bytes < max(sizes)
    assert 0 < found.read < found.total
    assert found.short_side == 80  # 512 for 224 pixels is 73 for 32, in steps of 16
    assert found.gain > 1.15
    said = report(found, "SET", 1000)
    assert "pack --short-side 80" in said
    assert "cannot be read (changed 100%)" in said
    reader = ShardReader(manifest)
    assert reader.read(0, 3)[0] == small  # nothing was changed


def test_no_image_is_measured_twice_and_no_pixels_are_kept(tmp_path, monkeypatch):
    write_set(tmp_path, [70])
    served: list[weakref.ref] = []
    kept: list[int] = []

    def within(batches, seconds):
        for batch in batches:
            served.append(weakref.ref(batch))
            kept.append(sum(each() is not None for each in served))
            yield batch

    monkeypatch.setattr(doctor, "_within", within)
    assert examine(str(tmp_path), 16, 30).measured == 64  # two batches, twice
    assert len(served) == 4
    assert max(kept) <= 2


def test_small_images_are_not_packed_anew(tmp_path):
    write_set(tmp_path, [8])
    assert examine(str(tmp_path), 224, 0.05).short_side is None


@pytest.mark.parametrize(
    ("times", "word"), [((9, 1, 1), "storage"), ((1, 9, 1), "smaller or JPEGs"), ((1, 1, 9), "augmentations")]
)
def test_says_what_limits_and_how_many_workers_a_rate_needs(times, word):
    read, decode, augment = (number / 1000 for number in times)
    found = Findings(10, 1, 224, measured=10, read=read, again=read, decode=decode, augment=augment, bytes=100_000)
    assert word in found.limit
    assert "82%" in found.limit
    assert found.workers(1000) == 11  # 11 ms each
    said = report(found, "SET", 1000)
    assert "1,000 images/s need 11 workers" in said
    assert "100 MB/s" in said


def test_the_command(tmp_path, capsys):
    write_set(tmp_path / "set", [8])
    assert main(["shards", "doctor", str(tmp_path / "set"), "--seconds", "0.1", "--size", "16"]) == DONE
    assert "images/s a worker" in capsys.readouterr().out
    assert main(["shards", "doctor", str(tmp_path)]) == INPUT_WRONG
