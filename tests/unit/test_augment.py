"""Augmentations against slow or independent versions, and against the distributions their papers give."""

import random
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from pydantic import ValidationError
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomResizedCrop

from penstock.augment import _pixels
from penstock.augment.crop_flip import CropFlip
from penstock.augment.multi_crop import MultiCrop
from penstock.augment.none import NoAugmentation
from penstock.augment.resize_crop import ResizeCrop
from penstock.augment.simclr import SimCLR
from penstock.augment.standard import Standard
from penstock.keyed import seed_sample

IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
PLANES = torch.from_numpy(IMAGE).permute(2, 0, 1).contiguous()


def far(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    return int((ours.int() - theirs.int()).abs().max())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 96])
def test_the_crop_is_torchvisions_resized_crop(interpolation, size):
    augment = CropFlip(CropFlip.Config(size=size, interpolation=interpolation, flip=0.0))
    mode = InterpolationMode(interpolation)
    for position in range(10):
        seed_sample(0, position, 0)
        ours = augment.view(IMAGE, 0, {"size": size})
        seed_sample(0, position, 0)
        box = _pixels.random_box(48, 64, (0.2, 1.0), (3 / 4, 4 / 3))
        assert far(ours, TF.resized_crop(PLANES, *box, [size, size], interpolation=mode, antialias=True)) <= 1


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (1.0, 1.0)])
def test_boxes_are_distributed_as_torchvisions(scale):
    theirs = RandomResizedCrop(8, scale=scale)
    random.seed(0), torch.manual_seed(0)
    ours = torch.tensor([_pixels.random_box(48, 64, scale, (3 / 4, 4 / 3)) for _ in range(4000)]).float()
    boxes = [theirs.make_params([PLANES]) for _ in range(4000)]
    reference = torch.tensor([[b["top"], b["left"], b["height"], b["width"]] for b in boxes]).float()
    spread = reference.std(0).clamp(min=0.1)
    assert ((ours.mean(0) - reference.mean(0)).abs() / spread).max() < 0.1
    assert ((ours.std(0) - reference.std(0)).abs() / spread).max() < 0.1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (2, 3), (10, 1000)])
def test_boxes_lie_inside_thin_images(height, width):
    for position in range(200):
        random.seed(position)
        top, left, h, w = _pixels.random_box(height, width, (0.5, 1.0), (3 / 4, 4 / 3))
        assert h >= 1 and w >= 1 and top >= 0 and left >= 0
        assert top + h <= height and left + w <= width


def test_half_of_the_views_are_mirrored():
    augment = CropFlip(CropFlip.Config(size=64, scale=(1.0, 1.0), ratio=(1.0, 1.0)))
    square = np.ascontiguousarray(IMAGE[:, :48])
    mirrored = 0
    for position in range(1000):
        seed_sample(0, position, 0)
        view = augment.view(square, 0, {"size": 48})
        mirrored += torch.equal(view, torch.from_numpy(square).permute(2, 0, 1).flip(-1))
    assert 440 < mirrored < 560


@pytest.mark.parametrize("shift", [-0.5, -0.2, -0.01, 0.0, 0.13, 0.2, 0.5])
def test_hue_is_torchvisions(shift):
    images = [PLANES, torch.full((3, 4, 4), 77, dtype=torch.uint8), torch.eye(3, dtype=torch.uint8)[:, :, None] * 255]
    for image in images:
        assert far(_pixels.shift_hue(image, shift), TF.adjust_hue(image, shift)) <= 1


@pytest.mark.parametrize(("sigma", "kernel"), [(0.1, 3), (0.5, 23), (1.3, 23), (2.0, 23), (2.0, 9)])
def test_blur_is_torchvisions(sigma, kernel):
    assert far(_pixels.gaussian_blur(PLANES, sigma, kernel), TF.gaussian_blur(PLANES, [kernel] * 2, [sigma] * 2)) <= 1


def test_simclr_jitter_is_torchvisions_in_the_drawn_order():
    augment = SimCLR(SimCLR.Config(size=32, strength=0.5, jitter=1.0, grayscale=0.0, blur=0.0))
    for position in range(20):
        seed_sample(0, position, 0)
        with patch.object(_pixels, "shift_hue", TF.adjust_hue):
            theirs = augment.view(IMAGE, 0, {"size": 32})
        seed_sample(0, position, 0)
        assert far(augment.view(IMAGE, 0, {"size": 32}), theirs) <= 4  # a grey level of hue, amplified by what follows


KINDS = (CropFlip, MultiCrop, NoAugmentation, ResizeCrop, SimCLR, Standard)
WRONG = (
    {"scale": (1.0, 0.2)},
    {"scale": (0.2, 1.5)},
    {"scale": (0.2, float("nan"))},
    {"ratio": (0.0, 1.0)},
    {"ratio": (1.0, float("inf"))},
    {"size": 0},
    {"size": {"name": "linear", "start": 32, "end": 0}},
)


@pytest.mark.parametrize(
    "kind, wrong",
    [(kind, wrong) for kind in KINDS for wrong in WRONG if wrong.keys() <= kind.Config.model_fields.keys()],
)
def test_views_that_cannot_be_are_refused(kind, wrong):
    with pytest.raises(ValidationError, match=r"lower value first|at most 1|at least 1 pixel"):
        kind.Config(**wrong)


def test_simclr_operations_happen_as_often_as_asked():
    counts = dict.fromkeys(["_jitter", "rgb_to_grayscale_image", "gaussian_blur", "solarize_image"], 0)
    import penstock.augment._distort as module

    def counted(owner, name):
        original = getattr(owner, name)

        def call(*args, **options):
            counts[name] += 1
            return original(*args, **options)

        return patch.object(owner, name, call)

    augment = SimCLR(SimCLR.Config(size=8, solarize=0.2))
    owners = [module, module._colours(), _pixels, module._colours()]
    with counted(owners[0], "_jitter"), counted(owners[1], "rgb_to_grayscale_image"), \
            counted(owners[2], "gaussian_blur"), counted(owners[3], "solarize_image"):  # fmt: skip
        for position in range(1000):
            for index in range(2):
                seed_sample(0, position, index)
                augment.view(IMAGE, index, {"size": 8})
    rates = {name: count / 2000 for name, count in counts.items()}
    expected = {"_jitter": 0.8, "rgb_to_grayscale_image": 0.2, "gaussian_blur": 0.5, "solarize_image": 0.1}
    assert all(abs(rates[name] - rate) < 0.04 for name, rate in expected.items()), rates


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (50, 50), (400, 31)])
def test_resize_crop_is_torchvisions(height, width):
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    planes = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    view = ResizeCrop(ResizeCrop.Config(size=28)).view(image, 0, {"size": 28})
    resized = TF.resize(planes, [32], interpolation=InterpolationMode.BICUBIC, antialias=True)
    assert far(view, TF.center_crop(resized, [28, 28])) <= 1
    whole = ResizeCrop(ResizeCrop.Config(size=28, crop_pct=1.0)).view(image, 0, {"size": 28})
    assert whole.shape == (3, 28, 28)


def test_none_leaves_an_image_of_the_right_size_alone():
    square = np.ascontiguousarray(IMAGE[:, :48])
    augment = NoAugmentation(NoAugmentation.Config(size=48))
    assert torch.equal(augment.view(square, 0, {"size": 48}), torch.from_numpy(square).permute(2, 0, 1))
    assert augment.view(IMAGE, 0, {"size": 20}).shape == (3, 20, 20)
