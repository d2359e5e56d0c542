"""JPEGs decoded at 1/2, 1/4 or 1/8 where the crop allows it: sizes, pixels, and independence of all but the sample."""

import io
import random

import numpy as np
import pytest
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import penstock.streams.decode as decode_module
import penstock.streams.images as images_module
from penstock.augment import Whole, _pixels
from penstock.augment.crop_flip import CropFlip
from penstock.augment.resize_crop import ResizeCrop
from penstock.augment.simclr import SimCLR
from penstock.augment.standard import Standard
from penstock.keyed import seed_sample
from penstock.schedule import Clock
from penstock.streams.data import Data
from penstock.streams.decode import ALL, DecodeError, Need, decode, decode_plan, decode_smaller
from penstock.streams.evaluation import EvalStream
from penstock.streams.images import Images
from penstock.streams.loader import Micro, assemble, need_of_views
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
        pixels, whole = decode_smaller(
            data, 3, lambda *size, size_=(height, width): Need(factor if size == size_ else 1)
        )
        assert whole == (height, width, factor)
        assert pixels.shape == (-(-height // factor), -(-width // factor), 3)
        # Beside the plain mean of each square of factor x factor pixels, with no shift.
        rows, columns = height // factor, width // factor
        squares = decode(data)[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor, 3)
        assert np.abs(pixels[:rows, :columns] - squares.mean((1, 3))).mean() < 2.5
        grey, _ = decode_smaller(data, 1, lambda *size: Need(factor))
        assert grey.shape == (*pixels.shape[:2], 1)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_pixels_are_those_of_pillows_draft(factor):
    data = encoded(photo(1), quality=95)
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (WIDTH // factor, HEIGHT // factor))
        theirs = np.asarray(image).astype(int)
    assert np.abs(decode_smaller(data, 3, lambda *size: Need(factor))[0] - theirs).max() <= 2


def test_a_factor_of_one_is_the_whole():
    data = encoded(photo(0))
    pixels, whole = decode_smaller(data, 3, lambda *size: ALL)
    assert whole is None and np.array_equal(pixels, decode(data))


def test_what_is_no_plain_jpeg_is_decoded_whole():
    for data in (
        encoded(photo(0), mode="CMYK"),
        encoded(photo(0), "PNG"),
        encoded(photo(0), "WEBP", lossless=True),
    ):
        pixels, whole = decode_smaller(data, 3, never)
        assert whole is None and np.array_equal(pixels, decode(data))
    odd = encoded(photo(0)).replace(b"\xff\xda", b"\x00" * 7 + b"\xff\xda", 1)  # Pillow's, which is asked second
    pixels, whole = decode_smaller(odd, 3, lambda *size: Need(4))
    assert whole is None and pixels.shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_is_decoded_smaller_too(orientation, factor):
    tags = Image.Exif()
    tags[0x0112] = orientation
    data = encoded(photo(0, 184, 248), quality=95, exif=tags.tobytes())
    with Image.open(io.BytesIO(data)) as image:
        whole = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    sizes = []
    pixels, said = decode_smaller(data, 3, lambda *size: (sizes.append(size), Need(factor, 40))[1])
    assert sizes == [whole.shape[:2]]
    assert said == (None if factor == 1 and orientation > 1 else (*whole.shape[:2], factor))
    assert pixels.flags.c_contiguous
    rows, columns = min(whole.shape[0] // factor, len(pixels)), whole.shape[1] // factor
    squares = whole[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor, 3).mean((1, 3))
    assert np.abs(pixels[:rows, :columns] - squares).mean() < 2.5


# Rows


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_rows_below_the_last_one_needed_change_nothing(factor, subsampling, channels):
    data = encoded(photo(3), quality=93, subsampling=subsampling)
    all_rows, _ = decode_smaller(data, channels, lambda *size: Need(factor))
    for rows in (1, 15, 16, 17, 100, HEIGHT - 20, HEIGHT - 1, HEIGHT):
        pixels, whole = decode_smaller(data, channels, lambda *size, rows=rows: Need(factor, rows))
        assert pixels.shape[1:] == all_rows.shape[1:] and (whole is None or whole == (HEIGHT, WIDTH, factor))
        bottom = min(len(all_rows), (rows + factor // 2) // factor)  # where `cut` ends a box that ends there
        assert bottom <= len(pixels) <= bottom + 40 // factor + 1
        assert np.array_equal(pixels[:bottom], all_rows[:bottom])


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_rows": 1}], ids=str)
def test_files_that_cannot_end_early_are_decoded_to_the_end(options):
    data = encoded(photo(3), **options)
    assert np.array_equal(decode_smaller(data, 3, lambda *size: Need(1, 16))[0], decode(data))


def test_a_cut_file_is_noticed_although_its_upper_rows_are_there():
    data = encoded(photo(3))
    assert decode_plan(data, lambda *size: Need(1, 16)).rows == 32
    with pytest.raises(DecodeError):
        decode_smaller(data[:-200], 3, lambda *size: Need(1, 16))


def test_damage_above_the_last_row_is_never_taken_for_the_end(monkeypatch):
    """What was changed before it was packed: checksums tell all that comes later."""
    data = encoded(photo(3), quality=90)
    begin, draw = data.index(b"\xff\xda") + 14, np.random.default_rng(0)
    monkeypatch.setattr(decode_module, "_with_pillow", lambda *_: None)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        place = begin + int(draw.integers((len(data) - begin) // 4))
        if draw.integers(2):
            damaged[place] ^= 1 << int(draw.integers(8))
        else:
            damaged[place : place + 2] = b"\xff\xd9"  # the end, too early
        upper, _ = decode_smaller(bytes(damaged), 3, lambda *size: Need(1, 150))
        refused += upper is None
        try:
            whole = simplejpeg.decode_jpeg(bytes(damaged), strict=True)
        except ValueError as error:  # a code that went astray and is legal may show at the file's end alone
            assert upper is None or "extraneous" in str(error) or "premature end" in str(error)
        else:
            assert np.array_equal(upper[:150], whole[:150])
    assert refused > 50


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
        factor = need_of_views(augment, {"size": SIZE}, [(7, position) for position in positions], HEIGHT, WIDTH).factor
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
        assert need_of_views(simple, {"size": size}, [(0, 0)], HEIGHT, WIDTH).factor == factor


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
    shards, numbers = ours.course.locate(np.arange(24))[:2]
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
    sample = images.load(0, 0, lambda height, width: Need(4))
    assert sample.whole == Whole(HEIGHT, WIDTH, 4) and sample.image.shape == (47, 63, 3)
    assert images.load(0, 5, lambda height, width: Need(4)).whole is None  # the PNG
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
