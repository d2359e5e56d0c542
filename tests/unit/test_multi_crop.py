"""Multi-crop: DINO's views by torchvision's operations, sizes of their own through the whole stream."""

from itertools import islice
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from pydantic import ValidationError
from torchvision.transforms import RandomResizedCrop

from penstock.augment import Boxed, Sized, _distort, _pixels, side_of, views_of
from penstock.augment.multi_crop import MultiCrop
from penstock.augment.simclr import SimCLR
from penstock.keyed import seed_sample
from penstock.schedule import Clock, Linear, Step
from penstock.streams.data import Data
from penstock.streams.loader import need_of_views
from penstock.streams.train import TrainStream
from tests.shards import damage, write_set

IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
KNOBS = {"size": 32, "local_size": 12}
PLAIN = {"jitter": 0.0, "grayscale": 0.0, "blur": (0, 0, 0), "solarize": (0, 0, 0)}


def made(**options) -> MultiCrop:
    return MultiCrop(MultiCrop.Config(**({"size": 32, "local_size": 12, "local_views": 3} | options)))


def stream(folder, augment, *, batch=12, world=1, rank=0, total=10, multiple=1, **data) -> TrainStream:
    return TrainStream(
        Data.Config(train=folder, **({"workers": 0} | data)),
        augment,
        batch=batch,
        accumulation=1,
        rank=rank,
        world=world,
        seed=0,
        clock=Clock(total, batch, 24),
        size_multiple=multiple,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("multi") / "set", [24]).root


def test_global_views_come_first_and_each_has_its_size():
    augment = made(global_views=3)
    assert isinstance(augment, Sized) and isinstance(augment, Boxed)
    assert views_of(augment.config) == augment.views == 6
    sides = [32, 32, 32, 12, 12, 12]
    assert [side_of(augment, index, KNOBS) for index in range(6)] == sides
    assert [tuple(augment.view(IMAGE, index, KNOBS).shape) for index in range(6)] == [(3, s, s) for s in sides]
    assert views_of(SimCLR.Config()) == 2 and side_of(SimCLR(SimCLR.Config()), 1, {"size": 20}) == 20


def test_the_defaults_are_dinos():
    config = MultiCrop.Config()
    assert (config.size, config.local_size, config.global_views, config.local_views) == (224, 96, 2, 8)
    assert (config.scale, config.local_scale) == ((0.4, 1.0), (0.05, 0.4))
    assert (config.jitter, config.jitter_most, config.grayscale) == (0.8, (0.4, 0.4, 0.2, 0.1), 0.2)
    assert (config.blur, config.solarize) == ((1.0, 0.1, 0.5), (0.0, 0.2, 0.0))


def test_boxes_are_drawn_as_torchvisions():
    augment = made(**PLAIN)
    planes = torch.zeros(3, 400, 500)
    for index, scale in ((0, [0.4, 1.0]), (1, [0.4, 1.0]), (2, [0.05, 0.4]), (4, [0.05, 0.4])):
        ours, theirs = [], []
        for position in range(1500):
            seed_sample(0, position, index)
            ours.append(augment.box(400, 500, index, KNOBS))
            theirs.append(RandomResizedCrop.get_params(planes, scale, [3 / 4, 4 / 3]))
        for found in (np.prod(np.array(boxes)[:, 2:], axis=1) / 200_000 for boxes in (ours, theirs)):
            assert scale[0] - 0.01 < found.min() < scale[0] + 0.02 and scale[1] - 0.05 < found.max() < scale[1] + 0.01
        apart = np.abs(np.mean(ours, axis=0) - np.mean(theirs, axis=0))
        assert (apart < 5 * np.std(theirs, axis=0) / np.sqrt(750)).all()


def test_a_plain_view_is_torchvisions_resized_crop():
    augment = made(flip=0.0, **PLAIN)
    for position in range(10):
        for index, side in ((0, 32), (1, 32), (3, 12)):
            seed_sample(1, position, index)
            top, left, height, width = augment.box(48, 64, index, KNOBS)
            seed_sample(1, position, index)
            view = augment.view(IMAGE, index, KNOBS)
            planes = torch.from_numpy(IMAGE).permute(2, 0, 1)
            theirs = TF.resized_crop(planes, top, left, height, width, [side, side], antialias=True, interpolation=3)
            assert (view.int() - theirs.int()).abs().max() <= 1


def test_operations_happen_as_often_as_asked_of_each_kind_of_view():
    names = ["_jitter", "rgb_to_grayscale_image", "gaussian_blur", "solarize_image"]
    owners = [_distort, _distort._colours(), _pixels, _distort._colours()]
    augment = made(size=8, local_size=8)
    expected = {
        0: [0.8, 0.2, 1.0, 0.0],
        1: [0.8, 0.2, 0.1, 0.2],
        2: [0.8, 0.2, 0.5, 0.0],
        4: [0.8, 0.2, 0.5, 0.0],
    }
    for index, rates in expected.items():
        counts = []
        for owner, name in zip(owners, names, strict=True):
            with patch.object(owner, name, wraps=getattr(owner, name)) as spy:
                for position in range(400):
                    seed_sample(0, position, index)
                    augment.view(IMAGE, index, {"size": 8, "local_size": 8})
            counts.append(spy.call_count / 400)
        assert all(abs(count - rate) < 0.07 for count, rate in zip(counts, rates, strict=True)), (index, counts)
        assert all(count == rate for count, rate in zip(counts, rates, strict=True) if rate in (0.0, 1.0))


def test_the_jitter_is_torchvisions_within_its_bounds():
    augment = made(flip=0.0, jitter=1.0, grayscale=0.0, blur=(0, 0, 0), solarize=(0, 0, 0))
    most = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2}
    colours = _distort._colours()
    asked: dict[str, list[float]] = {name: [] for name in [*most, "hue"]}
    for position in range(200):
        with (
            patch.object(colours, "adjust_brightness_image", wraps=TF.adjust_brightness) as brightness,
            patch.object(colours, "adjust_contrast_image", wraps=TF.adjust_contrast) as contrast,
            patch.object(colours, "adjust_saturation_image", wraps=TF.adjust_saturation) as saturation,
            patch.object(_pixels, "shift_hue", wraps=TF.adjust_hue) as hue,
        ):
            seed_sample(0, position, 0)
            augment.view(IMAGE, 0, KNOBS)
        for name, spy in zip(asked, (brightness, contrast, saturation, hue), strict=True):
            asked[name].append(spy.call_args.args[1])
    for name, change in most.items():
        assert 1 - change <= min(asked[name]) < 1 - 0.9 * change and 1 + 0.9 * change < max(asked[name]) <= 1 + change
    assert -0.1 <= min(asked["hue"]) < -0.09 and 0.09 < max(asked["hue"]) <= 0.1


def test_blur_fits_views_of_any_size():
    for size in (1, 2, 3, 8, 9, 40):
        view = made(blur=(1, 1, 1)).view(IMAGE, 0, {"size": size, "local_size": size})
        assert view.shape == (3, size, size)
    wide = _pixels.gaussian_blur(torch.from_numpy(IMAGE).permute(2, 0, 1), 2.0, 17)
    theirs = TF.gaussian_blur(torch.from_numpy(IMAGE).permute(2, 0, 1), [17, 17], [2.0, 2.0])
    assert (wide.int() - theirs.int()).abs().max() <= 1


def test_an_image_is_decoded_for_the_view_that_needs_most():
    """Of a whole image for a view of 100, and a quarter of it for one of 24, neither is enlarged."""
    options = {"scale": (1.0, 1.0), "local_scale": (0.25, 0.25), "ratio": (1.0, 1.0), "global_views": 1}
    augment = made(local_views=2, **options)

    def factor(size: int, local: int) -> int:
        return need_of_views(augment, {"size": size, "local_size": local}, [(0, 0)], 400, 400).factor

    assert factor(100, 24) == 4 and factor(100, 25) == 4 and factor(100, 26) == 4 and factor(100, 51) == 2
    assert factor(50, 25) == 8 and factor(50, 26) == 4 and factor(101, 25) == 2 and factor(40, 101) == 1
    brute = np.random.default_rng(0)
    augment = made()
    for position in range(200):
        knobs = {"size": int(brute.integers(8, 120)), "local_size": int(brute.integers(8, 60))}
        ratios = []
        for index in range(augment.views):
            seed_sample(5, position, index)
            ratios.append(min(augment.box(600, 800, index, knobs)[2:]) / side_of(augment, index, knobs))
        expected = max(f for f in (1, 2, 4, 8) if f <= max(1.0, min(ratios)))
        assert need_of_views(augment, knobs, [(5, position)], 600, 800).factor == expected


def test_views_of_two_sizes_come_out_of_a_stream(folder):
    augment = made(size=8, local_size=4)
    inline, forked = (next(stream(folder, augment, workers=workers).batches(0)) for workers in (0, 2))
    assert [tuple(view.shape) for view in inline.views] == [(12, 3, 8, 8)] * 2 + [(12, 3, 4, 4)] * 3
    assert all(torch.equal(a, b) for a, b in zip(inline.views, forked.views, strict=True))


def test_a_batch_without_a_readable_sample_has_the_same_shapes(tmp_path):
    manifest = write_set(tmp_path / "bad", [4])
    for number in range(4):
        damage(manifest, number)
    (batch,) = islice(stream(manifest.root, made(size=8, local_size=4), batch=4).batches(0), 1)
    assert batch.weights.tolist() == [0] * 4
    assert [tuple(view.shape) for view in batch.views] == [(4, 3, 8, 8)] * 2 + [(4, 3, 4, 4)] * 3


def test_sizes_follow_curves_each_of_its_own(folder):
    size, local = Linear(start=8, end=16), Step(start=4, milestones=["5 steps"], values=[8])
    augment = made(size=size, local_size=local)
    shapes = [
        [view.shape[-1] for view in batch.views]
        for batch in islice(stream(folder, augment, multiple=4, workers=2, prefetch=3).batches(0), 10)
    ]
    # Halves are rounded to even, as everywhere: 10 / 4 is 2, 14 / 4 is 4.
    expected = [round(size.at(step, Clock(10, 12, 24)) / 4) * 4 for step in range(10)]
    assert shapes == [[side] * 2 + [4 if step < 5 else 8] * 3 for step, side in enumerate(expected)]


def test_ranks_and_repeats_see_the_same_pixels(folder):
    augment = made(size=8, local_size=4)

    def views(world: int) -> dict[int, list[torch.Tensor]]:
        found = {}
        for rank in range(world):
            for batch in islice(stream(folder, augment, world=world, rank=rank, repeats=3).batches(0), 3):
                for slot, position in enumerate(batch.positions.tolist()):
                    found[position] = [view[slot] for view in batch.views]
        return found

    alone, shared = views(1), views(4)
    assert alone.keys() == shared.keys() == set(range(36))
    for position, mine in alone.items():
        assert all(torch.equal(a, b) for a, b in zip(mine, shared[position], strict=True))
    assert not torch.equal(alone[0][0], alone[1][0])  # a sample's servings are augmented anew


def test_greyscale_images_have_no_colours_to_change():
    view = made(jitter=1.0, grayscale=1.0).view(IMAGE[:, :, :1], 0, KNOBS)
    assert view.shape == (1, 32, 32)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": (0.5, 0.4)},
        {"scale": (0.0, 1.0)},
        {"local_scale": (0.1, 1.5)},
        {"blur": (1.0, 0.1)},
        {"blur": (1.0, 0.1, 2.0)},
        {"solarize": (0.0, -0.2, 0.0)},
        {"jitter_most": (0.4, 0.4, 0.2, 0.6)},
        {"global_views": 0},
        {"local_views": -1},
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(wrong):
    with pytest.raises(ValidationError):
        MultiCrop.Config(**wrong)


def test_without_local_views_it_makes_what_two_view_methods_compare():
    assert views_of(MultiCrop.Config(local_views=0)) == 2
