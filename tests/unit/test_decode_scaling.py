"""JPEGs decoded at 1/2, 1/4 or 1/8 where the crop allows it: sizes, pixels, and independence of all but the sample."""

import io
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import penstock.streams.images as images_module
from penstock.augment import Whole, _pixels
from penstock.augment.crop_flip import CropFlip
from penstock.augment.resize_crop import ResizeCrop
from penstock.augment.simclr import SimCLR
from penstock.augment.standard import Standard
from penstock.keyed import seed_sample
from penstock.schedule import Clock
from penstock.streams.data import Data
from penstock.streams.decode import decode, decode_smaller
from penstock.streams.evaluation import EvalStream
from penstock.streams.images import Images
from penstock.streams.loader import Micro, assemble, largest_factor
from penstock.streams.train import TrainStream
from tests.shards import write_set

HEIGHT, WIDTH, SIZE = 187, 250, 24
CLOCK = Clock(total=12, batch=12, epoch=24)


def photo(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Noise with the spectrum of photographs, which falls with the frequency, and most of it in the brightness."""
    noise = np.random.default_rng(number).normal(size=(height, width, 3)) @ (np.eye(3) + 2)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    spectrum = np.fft.fft2(noise, axes=(0, 1)) / (frequency + 1 / width)[:, :, None]
    pixels = np.fft.ifft2(spectrum, axes=(0, 1)).real
    return (128 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def never(height: int, width: int) -> int:
    pytest.fail("asked, although it must be decoded whole")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 samples, one of them a PNG and one of them too small to be reduced."""
    path = tmp_path_factory.mktemp("data") / "set"

    def content(number):
        if number == 5:
            return encoded(photo(number), "PNG")
        return encoded(photo(number, 30, 40) if number == 6 else photo(number), quality=90)

    write_set(path, [11, 13], content, suffix="jpg", size=(HEIGHT, WIDTH))
    return path


# Decoding


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"mode": "L"}], ids=str)
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_sizes_and_pixels_of_a_smaller_image(factor, options):
    for height, width in [(HEIGHT, WIDTH), (64, 48), (65, 49), (71, 55), (63, 47)]:
        data = encoded(photo(0, height, width), quality=95, **options)
        pixels, whole = decode_smaller(data, 3, lambda *size, size_=(height, width): factor if size == size_ else 1)
        assert whole == (height, width, factor)
        assert pixels.shape == (-(-height // factor), -(-width // factor), 3)
        # Beside the plain mean of each square of factor x factor pixels, with no shift.
        rows, columns = height // factor, width // factor
        squares = decode(data)[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor, 3)
        assert np.abs(pixels[:rows, :columns] - squares.mean((1, 3))).mean() < 2.5
        grey, _ = decode_smaller(data, 1, lambda *size: factor)
        assert grey.shape == (*pixels.shape[:2], 1)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_pixels_are_those_of_pillows_draft(factor):
    data = encoded(photo(1), quality=95)
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (WIDTH // factor, HEIGHT // factor))
        theirs = np.asarray(image).astype(int)
    assert np.abs(decode_smaller(data, 3, lambda *size: factor)[0] - theirs).max() <= 2


def test_a_factor_of_one_is_the_whole():
    data = encoded(photo(0))
    pixels, whole = decode_smaller(data, 3, lambda *size: 1)
    assert whole is None and np.array_equal(pixels, decode(data))


def test_what_is_no_plain_jpeg_is_decoded_whole():
    turned = Image.Exif()
    turned[0x0112] = 6
    for data in (
        encoded(photo(0), exif=turned.tobytes()),
        encoded(photo(0), mode="CMYK"),
        encoded(photo(0), "PNG"),
        encoded(photo(0), "WEBP", lossless=True),
    ):
        pixels, whole = decode_smaller(data, 3, never)
        assert whole is None and np.array_equal(pixels, decode(data))
    odd = encoded(photo(0)).replace(b"\xff\xda", b"\x00" * 7 + b"\xff\xda", 1)  # Pillow's, which is asked second
    pixels, whole = decode_smaller(odd, 3, lambda *size: 4)
    assert whole is None and pixels.shape == (HEIGHT, WIDTH, 3)


# Boxes and factors


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_every_box_keeps_its_place_and_enough_pixels(factor):
    length = 45
    places = np.arange(-(-length // factor), dtype=np.uint8)
    image = np.broadcast_to(places[:, None, None], (len(places), len(places), 3)).copy()
    for top in range(length):
        for height in range(factor, length - top + 1):
            kept = _pixels.cut(image, (top, 0, height, length), factor)[0, :, 0]
            assert len(kept) >= height // factor
            assert abs(int(kept[0]) - top / factor) <= 0.5
            assert abs(int(kept[-1]) + 1 - (top + height) / factor) <= 0.5


@pytest.mark.parametrize("augment", [CropFlip, SimCLR, Standard], ids=lambda kind: kind.__name__)
def test_the_largest_factor_of_the_most_demanding_view(augment):
    augment, found = augment(augment.Config(size=SIZE)), set()
    for row in range(60):
        positions = range(2 * row, 2 * row + 2)
        factor = largest_factor(augment, {"size": SIZE}, [(7, position) for position in positions], HEIGHT, WIDTH)
        sides: list[int] = []
        for position in positions:
            for view in range(augment.views):
                seed_sample(7, position, view)
                sides += _pixels.random_box(HEIGHT, WIDTH, augment.config.scale, augment.config.ratio)[2:]
        assert factor == max(f for f in (1, 2, 4, 8) if f == 1 or min(sides) / f >= SIZE)
        found.add(factor)
    assert len(found) >= 2
    for size, factor in [(HEIGHT, 1), (HEIGHT // 2, 2), (HEIGHT // 2 + 1, 1), (23, 8), (24, 4), (1, 8)]:
        simple = Standard(Standard.Config(size=size, crop="simple", pad=0))
        assert largest_factor(simple, {"size": size}, [(0, 0)], HEIGHT, WIDTH) == factor


def test_interpolation_drawn_before_the_box():
    augment = Standard(Standard.Config(size=SIZE, interpolation="random"))
    for position in range(10):
        seed_sample(0, position, 0)
        random.choice("ab")
        expected = _pixels.random_box(HEIGHT, WIDTH, (0.08, 1.0), (3 / 4, 4 / 3))
        seed_sample(0, position, 0)
        assert augment.box(HEIGHT, WIDTH, 0, {"size": SIZE, "strength": 1.0}) == expected


# Streams


def stream(folder, augment=None, batch=12, rank=0, world=1, **data):
    augment = augment or SimCLR(SimCLR.Config(size={"name": "linear", "start": 16, "end": 64}))
    options = {"batch": batch, "accumulation": 1, "rank": rank, "world": world, "seed": 3, "clock": CLOCK}
    return TrainStream(Data.Config(train=folder, **{"workers": 0, **data}), augment, **options)


def views_of(stream, since=0, steps=12):
    """Every view by position."""
    found = {}
    for _, batch in zip(range(since // stream.batch, steps), stream.batches(since), strict=False):
        for row, position in enumerate(batch.positions.tolist()):
            found[position] = [view[row] for view in batch.views]
    return found


def decoded(monkeypatch):
    """The factors of all images that are decoded from here on, in this process."""
    calls = []

    def spy(*arguments):
        pixels, whole = decode_smaller(*arguments)
        calls.append(whole.factor if whole else 1)
        return pixels, whole

    monkeypatch.setattr(images_module, "decode_smaller", spy)
    return calls


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_same_pixels_on_other_ranks_workers_and_after_a_resume(folder, repeats, monkeypatch):
    factors = decoded(monkeypatch)
    alone = views_of(stream(folder, repeats=repeats))
    assert set(factors) == ({1, 2, 4, 8} if repeats == 1 else {1, 2, 4})
    assert len(factors) == len(alone) / repeats  # one for all views and repeats of a sample
    others: dict[int, list[torch.Tensor]] = {}
    for rank in range(2):
        others |= views_of(stream(folder, repeats=repeats, rank=rank, world=2, workers=rank))
    resumed = views_of(stream(folder, repeats=repeats, workers=1), since=60)
    assert sorted(alone) == sorted(others) == list(range(144)) and sorted(resumed) == list(range(60, 144))
    for found in (others, resumed):
        for position, views in found.items():
            assert all(map(torch.equal, views, alone[position]))


@pytest.mark.parametrize("crop", ["random_resized", "simple"])
def test_views_are_near_those_of_whole_images(folder, crop):
    options = {"size": SIZE, "flip": 0.5, "crop": crop}
    smaller = views_of(stream(folder, Standard(Standard.Config(**options))))
    whole = views_of(stream(folder, Standard(Standard.Config(**options)), cache="ram"))
    far = [(smaller[p][0].float() - whole[p][0].float()).abs().mean().item() for p in whole]
    one_pixel_off = np.mean([view.float().diff(dim=-1).abs().mean().item() for (view,) in whole.values()])
    assert 0 < np.mean(far) < one_pixel_off / 3 and max(far) < one_pixel_off


def test_whole_images_give_the_pixels_they_always_gave(folder):
    """Where nothing can be decoded smaller; against a transcription: decode, box, resize, flip."""
    size = 100
    ours = stream(folder, CropFlip(CropFlip.Config(size=size)))
    shards, numbers = ours.order.locate(np.arange(24))
    for position, views in views_of(ours, steps=2).items():
        image = ours.images.load(int(shards[position]), int(numbers[position])).image
        seed_sample(3, position, 0)
        top, left, height, width = _pixels.random_box(image.shape[0], image.shape[1], (0.2, 1.0), (3 / 4, 4 / 3))
        crop = torch.from_numpy(image).permute(2, 0, 1)[None, :, top : top + height, left : left + width]
        view = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]
        assert torch.equal(views[0], view.flip(-1) if random.random() < 0.5 else view)


def test_a_cache_and_what_draws_no_box_decode_whole(folder, monkeypatch):
    monkeypatch.setattr(images_module, "decode_smaller", lambda *_: pytest.fail("decoded smaller"))
    views_of(stream(folder, cache="ram"), steps=2)
    views_of(stream(folder, decode="whole"), steps=2)
    images, augment = Images(ours := stream(folder).manifest), ResizeCrop(ResizeCrop.Config(size=16))
    served = torch.cat([batch.views[0] for batch in EvalStream(images, augment, batch=8)])
    assert len(served) == ours.samples
    for number, view in enumerate(served):
        image = images.load(0, number).image if number < 11 else images.load(1, number - 11).image
        assert image is not None
        assert torch.equal(view, augment.view(image, 0, {"size": 16}))


def test_a_sample_decoded_smaller_says_so(folder):
    images = stream(folder).images
    sample = images.load(0, 0, lambda height, width: 4)
    assert sample.whole == Whole(HEIGHT, WIDTH, 4) and sample.image.shape == (47, 63, 3)
    assert images.load(0, 5, lambda height, width: 4).whole is None  # the PNG
    assert images.load(0, 0).whole is None


def test_neighbours_that_serve_one_sample_in_two_epochs_are_decoded_apart(folder, monkeypatch):
    factors = decoded(monkeypatch)
    augment = SimCLR(SimCLR.Config(size=16))
    same = np.zeros(4, dtype=np.int64)
    together = assemble(Micro(np.arange(4), same, same, {"size": 16}, 0), stream(folder).images, augment, 3)
    assert len(factors) == 4
    for position in range(4):
        micro = Micro(np.array([position]), same[:1], same[:1], {"size": 16}, 0)
        alone = assemble(micro, stream(folder).images, augment, 3)
        assert all(torch.equal(one[position], other[0]) for one, other in zip(together.views, alone.views, strict=True))
