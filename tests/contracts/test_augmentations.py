"""What every augmentation promises; a new file in `penstock/augment` is tested the moment it exists."""

import random

import numpy as np
import pytest
import torch

from penstock.augment import AUGMENTATIONS
from penstock.keyed import seed_sample
from penstock.schedule import knobs_of

SHAPES = [(32, 32, 3), (48, 80, 3), (80, 48, 3), (5, 3, 3), (1, 1, 3), (32, 40, 1)]


@pytest.fixture(params=AUGMENTATIONS.names())
def augment(request):
    kind = AUGMENTATIONS.get(request.param)
    config = kind.Config()
    assert config.name == request.param
    assert "size" in knobs_of(config)
    return kind(config)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_and_type(augment, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    before = image.copy()
    knobs = knobs_of(augment.config)
    for size in (16, 32):
        for index in range(augment.views):
            seed_sample(0, 0, index)
            view = augment.view(image, index, {**knobs, "size": size})
            assert (view.dtype, tuple(view.shape)) == (torch.uint8, (shape[2], size, size))
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


def test_it_can_be_sent_to_a_worker(augment):
    import pickle

    copy = pickle.loads(pickle.dumps(augment))
    assert copy.config == augment.config
