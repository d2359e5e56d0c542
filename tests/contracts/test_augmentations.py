"""What every augmentation promises; a new file in `penstock/augment` is tested the moment it exists."""

import random

import numpy as np
import pytest
import torch

from penstock.augment import AUGMENTATIONS, Boxed, Sized, Whole, is_side, side_of, views_of
from penstock.keyed import seed_sample
from penstock.schedule import knobs_of

SHAPES = [(32, 32, 3), (48, 80, 3), (80, 48, 3), (5, 3, 3), (1, 1, 3), (32, 40, 1)]


@pytest.fixture(params=AUGMENTATIONS.names())
def augment(request):
    kind = AUGMENTATIONS.get(request.param)
    config = kind.Config()
    assert config.name == request.param
    assert "size" in knobs_of(config)
    made = kind(config)
    assert made.views == views_of(config)
    return made


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_and_type(augment, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    before = image.copy()
    knobs = knobs_of(augment.config)
    assert isinstance(augment, Sized) or [name for name in knobs if is_side(name)] == ["size"]
    for size in (16, 32):
        for index in range(augment.views):
            seed_sample(0, 0, index)
            now = {**knobs, "size": size}
            view, side = augment.view(image, index, now), side_of(augment, index, now)
            assert (view.dtype, tuple(view.shape)) == (torch.uint8, (shape[2], side, side))
    assert np.array_equal(image, before)


def test_keyed_by_the_seed_of_the_sample_alone(augment):
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    knobs = {**knobs_of(augment.config), "size": 24}
    for position in range(5):
        for index in range(augment.views):
            seed_sample(1, position, index)
            once = augment.view(image, index, knobs).clone()
            torch.manual_seed(position), random.seed(position), np.random.seed(position)
            torch.rand(7), random.random(), np.random.rand(3)
            seed_sample(1, position, index)
            assert torch.equal(once, augment.view(image, index, knobs))


def test_a_box_tells_all_that_the_view_needs(augment):
    if not isinstance(augment, Boxed):
        return
    rng = np.random.default_rng(0)
    image, knobs = rng.integers(0, 256, (60, 90, 3), dtype=np.uint8), {**knobs_of(augment.config), "size": 16}
    for position in range(20):
        for index in range(augment.views):
            seed_sample(2, position, index)
            top, left, height, width = augment.box(60, 90, index, knobs)
            assert 0 <= top < top + height <= 60 and 0 <= left < left + width <= 90
            other = rng.integers(0, 256, image.shape, dtype=np.uint8)
            inside = np.s_[top : top + height, left : left + width]
            other[inside] = image[inside]
            seed_sample(2, position, index)
            once = augment.view(image, index, knobs).clone()
            seed_sample(2, position, index)
            assert torch.equal(once, augment.view(other, index, knobs))


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_an_image_decoded_smaller_gives_the_same_view(augment, factor):
    if not isinstance(augment, Boxed):
        return
    height, width = 187, 250
    down, across = np.mgrid[: -(-height // factor) * factor, : -(-width // factor) * factor]
    smooth = np.stack([across, down * 1.3, 255 - (across + down) * 0.58], 2).clip(0, 255)
    smaller = smooth.reshape(len(down) // factor, factor, -1, factor, 3).mean((1, 3)).round().astype(np.uint8)
    image, knobs = smooth[:height, :width].round().astype(np.uint8), {**knobs_of(augment.config), "size": 16}
    far = []
    for position in range(20):
        for index in range(augment.views):
            seed_sample(3, position, index)
            whole = augment.view(image, index, knobs).int()
            seed_sample(3, position, index)
            view = augment.view(smaller, index, knobs, Whole(height, width, factor)).int()
            far.append((view - whole).abs().float().mean().item())
    # An edge is up to half a decoded pixel off, and colours may be amplified after that.
    assert np.mean(far) <= (0 if factor == 1 else 0.5 * factor) and max(far) <= 2 * factor


def test_it_can_be_sent_to_a_worker(augment):
    import pickle

    copy = pickle.loads(pickle.dumps(augment))
    assert copy.config == augment.config
