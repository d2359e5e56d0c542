"""The supervised augmentation against timm's and torchvision's own transforms, and against slow transcriptions."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2

from penstock.augment import _erasing, _pixels, _policies
from penstock.augment.standard import Standard
from penstock.errors import InputError
from penstock.keyed import seed_sample
from penstock.recipe import Block, Source, check, one_of
from penstock.schedule import Clock
from penstock.streams.data import Data
from penstock.streams.train import TrainStream
from tests.shards import write_set

SIDE = 40
POLICIES = ["randaugment", "trivial", "augmix", "three_augment"]
WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0}  # the crop takes all of a square image


def smooth(seed: int = 0, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """A picture with edges and slopes, and no two rows or columns alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


IMAGE = smooth()


def standard(**options: Any) -> Standard:
    return Standard(Standard.Config(size=SIDE, **options))


def view(augment: Standard, position: int = 0, image: np.ndarray = IMAGE, strength: float = 1.0, size: int = SIDE):
    seed_sample(7, position, 0)
    return augment.view(image, 0, {"size": size, "strength": strength})


def hwc(tensor: torch.Tensor) -> np.ndarray:
    return tensor.permute(1, 2, 0).numpy()


@pytest.fixture
def older_pillow(monkeypatch):
    """Pillow before 13 posterized to 0 bits, which timm asks for at magnitude 10; a transcription of it."""

    def posterize(image, bits):
        return Image.fromarray(np.asarray(image) & np.uint8((0xFF << (8 - bits)) & 0xFF))

    monkeypatch.setattr(ImageOps, "posterize", posterize)


# Policies -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "rand-m9-mstd0.5-inc1"),
        ({"magnitude": 7, "increasing": False}, "rand-m7-mstd0.5"),
        ({"magnitude": 10, "magnitude_std": 0, "ops": 4}, "rand-m10-n4-inc1"),
        ({"magnitude": 2, "magnitude_std": 1.0, "increasing": False, "interpolation": "random"}, "rand-m2-mstd1.0"),
    ],
)
@pytest.mark.parametrize("channels", [3, 1])
def test_randaugment_is_timms_with_the_same_draws(older_pillow, settings, text, channels):
    fill = (124, 116, 104) if channels == 3 else 117
    hparams: dict[str, Any] = {"img_mean": fill}
    if settings.get("interpolation") != "random":
        hparams["interpolation"] = Image.Resampling.BICUBIC
    theirs = auto_augment.rand_augment_transform(text, hparams)
    ours = standard(policy="randaugment", **settings)._policy(1.0, channels)
    picture = Image.fromarray(IMAGE) if channels == 3 else Image.fromarray(IMAGE[:, :, 0])
    changed = 0
    for position in range(150):
        seed_sample(0, position, 0)
        mine = np.asarray(ours(picture))
        seed_sample(0, position, 0)
        assert np.array_equal(mine, np.asarray(theirs(picture)))
        changed += not np.array_equal(mine, np.asarray(picture))
    assert changed > 60


def test_no_magnitude_breaks_a_run():
    """timm's operations alone raise at both ends of the scale with Pillow 13."""
    for increasing in (True, False):
        for magnitude in (0, 1, 10):
            augment = standard(policy="randaugment", magnitude=magnitude, increasing=increasing, ops=6)
            for position in range(60):
                view(augment, position)


@pytest.mark.parametrize("policy", ["augmix", "three_augment"])
def test_augmix_and_three_augment_are_timms_with_the_same_draws(policy):
    hparams = {"img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    if policy == "augmix":
        theirs = auto_augment.augment_and_mix_transform("augmix-m3", {**hparams, "translate_pct": 0.3})
    else:
        theirs = auto_augment.auto_augment_transform("3a", hparams)
    augment = standard(policy=policy, **WHOLE)
    for position in range(60):
        with pytest.MonkeyPatch.context() as patched:
            # The crop's draws come first; without them the policy starts at the seed, as timm's does here.
            patched.setattr(_pixels, "crop_flip", lambda image, *_: _pixels.planes(image))
            ours = view(augment, position)
        seed_sample(7, position, 0)
        if policy == "three_augment":
            random.random()  # whether it acts at all, which depends on the strength
        assert np.array_equal(hwc(ours), np.asarray(theirs(Image.fromarray(IMAGE))))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_trivial_is_torchvisions_with_the_same_draws(interpolation):
    theirs = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode(interpolation))
    augment = standard(policy="trivial", interpolation=interpolation, **WHOLE)
    for position in range(60):  # the crop draws from Python's generator, TrivialAugment from torch's
        ours = view(augment, position)
        seed_sample(7, position, 0)
        assert np.array_equal(hwc(ours), np.asarray(theirs(Image.fromarray(IMAGE))))


def test_three_augment_draws_its_three_alike():
    augment, counts = standard(policy="three_augment", **WHOLE), Counter()
    gray = np.asarray(Image.fromarray(IMAGE).convert("L").convert("RGB"))
    solarized = np.where(IMAGE < 128, IMAGE, 255 - IMAGE)
    for position in range(900):
        seen = hwc(view(augment, position))
        near_gray = int(np.abs(seen.astype(int) - gray).max()) <= 1
        counts["gray" if near_gray else "solarized" if np.array_equal(seen, solarized) else "blurred"] += 1
    assert all(250 < counts[kind] < 350 for kind in ("gray", "solarized", "blurred"))


def test_a_whole_recipe_changes_as_much_as_timms():
    """DeiT's recipe beside timm's create_transform: the same distance from the image, on average and in spread."""
    theirs = create_transform(
        SIDE, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", normalize=False
    )
    ours = standard(policy="randaugment")
    distances: dict[str, list[float]] = {"ours": [], "theirs": []}
    for position in range(1500):
        image = smooth(position % 50)
        seen = view(ours, position, image)
        seed_sample(8, position, 0)
        try:
            reference = theirs(Image.fromarray(image))
        except ValueError:  # Pillow 13 and 0 bits
            continue
        for name, tensor in (("ours", seen), ("theirs", reference)):
            distances[name].append(float((tensor.float() - torch.from_numpy(image).permute(2, 0, 1)).abs().mean()))
    mean, spread = ({name: f(values) for name, values in distances.items()} for f in (np.mean, np.std))
    assert abs(mean["ours"] - mean["theirs"]) < 4 * spread["theirs"] * (2 / 1500) ** 0.5
    assert spread["ours"] == pytest.approx(spread["theirs"], rel=0.1)


# Colours --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["color_jitter_prob", "grayscale", "blur", "solarize", "erase"])
def test_each_part_happens_with_its_probability(part):
    options: dict[str, Any] = {part: 0.3, "color_jitter": 0.4 if part == "color_jitter_prob" else 0.0}
    augment, untouched = standard(**options, **WHOLE), torch.from_numpy(IMAGE).permute(2, 0, 1)
    changed = sum(not torch.equal(view(augment, position), untouched) for position in range(1000))
    assert 240 < changed < 360


def test_the_jitter_is_torchvisions():
    theirs = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    augment = standard(color_jitter=0.4, hue=0.1, **WHOLE)
    for position in range(20):
        ours = view(augment, position)
        seed_sample(7, position, 0)
        assert np.array_equal(hwc(ours), np.asarray(theirs(Image.fromarray(IMAGE))))


def test_solarize_inverts_light_pixels_and_greyscale_makes_channels_equal():
    solarized = hwc(view(standard(solarize=1.0, **WHOLE)))
    assert np.array_equal(solarized, np.where(IMAGE < 128, IMAGE, 255 - IMAGE))
    gray = hwc(view(standard(grayscale=1.0, **WHOLE)))
    luma = IMAGE @ np.array([0.299, 0.587, 0.114])
    assert np.abs(gray - luma[:, :, None]).max() <= 1


@pytest.mark.parametrize("policy", ["none", *POLICIES])
def test_one_channel(policy):
    everything = {"color_jitter": 0.4, "hue": 0.1, "grayscale": 1.0, "blur": 1.0, "solarize": 0.5, "erase": 1.0}
    gray = IMAGE[:, :, :1]
    for position in range(40):
        seen = view(standard(policy=policy, **everything), position, gray)
        assert (seen.dtype, tuple(seen.shape)) == (torch.uint8, (1, SIDE, SIDE))
    assert torch.equal(view(standard(grayscale=1.0, **WHOLE), image=gray), torch.from_numpy(gray).permute(2, 0, 1))


# Erasing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(40, 40), (224, 224), (9, 60), (3, 3)])
def test_boxes_are_timms_with_the_same_draws(height, width):
    theirs, found = RandomErasing(probability=1.0, mode="const", device="cpu"), 0
    for position in range(300):
        random.seed(position)
        erased = theirs(torch.ones(1, height, width))[0] == 0
        random.seed(position), random.random()  # timm's draw for the probability
        box = _erasing.erasing_box(height, width, (0.02, 1 / 3))
        expected = torch.zeros(height, width, dtype=torch.bool)
        if box is not None:
            top, left, h, w = box
            expected[top : top + h, left : left + w] = True
            found += 1
        assert torch.equal(erased, expected)
    assert found > 100


def test_noise_is_timms_before_normalisation():
    """timm's N(0, 1) after normalisation, turned back into pixels and clipped, beside ours."""
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    torch.manual_seed(0)
    theirs = (255 * (torch.randn(3, 300, 300) * std + mean)).round().clamp(0, 255)
    ours = []
    for position in range(60):
        random.seed(position)
        box = _erasing.erasing_box(200, 200, (0.2, 0.3))
        random.seed(position)
        erased = _erasing.erase(torch.zeros(3, 200, 200, dtype=torch.uint8), "pixel", (0.2, 0.3))
        top, left, h, w = box
        ours.append(erased[:, top : top + h, left : left + w].flatten(1).float())
        assert int((erased > 0).any(0).sum()) <= h * w
    noise = torch.cat(ours, 1)
    assert torch.allclose(noise.mean(1), theirs.mean((1, 2)), atol=0.6)
    assert torch.allclose(noise.std(1), theirs.flatten(1).std(1), atol=0.6)
    assert len(noise[0].unique()) > 250  # a draw for every pixel


def test_const_is_the_mean_colour():
    augment, counts = standard(erase=1.0, erase_mode="const", erase_area=(0.3, 0.3), **WHOLE), []
    for position in range(20):
        changed = hwc(view(augment, position, np.zeros_like(IMAGE)))
        assert {tuple(pixel) for pixel in changed.reshape(-1, 3).tolist()} == {(0, 0, 0), (124, 116, 104)}
        counts.append((changed[:, :, 0] > 0).mean())
    assert np.mean(counts) == pytest.approx(0.3, abs=0.02)


def test_erasing_does_not_reach_the_image():
    image = IMAGE.copy()
    view(standard(erase=1.0, **WHOLE), image=image)
    assert np.array_equal(image, IMAGE)


# Crops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["reflect", "constant"])
def test_the_simple_crop_is_numpys_pad_and_slice(padding):
    augment = standard(crop="simple", padding=padding, flip=0.0)
    image = smooth(3, SIDE, 70)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), padding)
    found = Counter()
    for position in range(400):
        seen = hwc(view(augment, position, image))
        places = [
            (top, left)
            for top in range(9)
            for left in range(70 + 8 - SIDE + 1)
            if np.array_equal(seen[0], padded[top, left : left + SIDE])
            and np.array_equal(seen, padded[top : top + SIDE, left : left + SIDE])
        ]
        assert len(places) == 1
        found[places[0][0]] += 1
    assert set(found) == set(range(9)) and min(found.values()) > 20


def test_the_simple_crop_resizes_the_short_side():
    for height, width in ((20, 30), (90, 60), (1, 5), (SIDE, SIDE)):
        seen = view(standard(crop="simple", flip=0.0, pad=0), image=smooth(1, height, width))
        tall, wide = (SIDE * height // min(height, width), SIDE * width // min(height, width))
        whole = v2.functional.resize(torch.from_numpy(smooth(1, height, width)).permute(2, 0, 1), [tall, wide], 3)
        strips = whole.unfold(2, SIDE, 1) if wide > tall else whole.unfold(1, SIDE, 1).transpose(-1, -2)
        dimension = 2 if wide > tall else 1
        crops = [whole.narrow(dimension, start, SIDE) for start in range(strips.shape[dimension])]
        assert min(int((crop.int() - seen.int()).abs().max()) for crop in crops) <= 1


def test_random_interpolation_takes_both():
    modes = {mode: standard(interpolation=mode, scale=(0.5, 0.5), flip=0.0) for mode in ("bilinear", "bicubic")}
    augment = standard(interpolation="random", scale=(0.5, 0.5), flip=0.0)
    counts = Counter()
    for position in range(100):
        seed_sample(7, position, 0)
        random.choice(("bilinear", "bicubic"))
        state, knobs = random.getstate(), {"size": SIDE, "strength": 1.0}
        both = {}
        for mode, alone in modes.items():
            random.setstate(state)
            both[mode] = alone.view(IMAGE, 0, knobs)
        seen = view(augment, position)
        counts.update(mode for mode, reference in both.items() if torch.equal(seen, reference))
    assert counts["bilinear"] + counts["bicubic"] == 100 and min(counts.values()) > 30


# Strength -------------------------------------------------------------------------------------

ALL_PARTS = {"color_jitter": 0.4, "hue": 0.1, "grayscale": 0.5, "blur": 0.5, "solarize": 0.5, "erase": 1.0}


@pytest.mark.parametrize("policy", POLICIES)
def test_strength_0_is_crop_and_flip_alone(policy):
    full, plain = standard(policy=policy, **ALL_PARTS), standard()
    differs = 0
    for position in range(40):
        assert torch.equal(view(full, position, strength=0.0), view(plain, position))
        differs += not torch.equal(view(full, position), view(plain, position))
    assert differs > 35


def test_half_the_strength_is_half_of_everything():
    whole = standard(policy="randaugment", magnitude=8, color_jitter=0.4, hue=0.2, grayscale=0.6, erase=0.8)
    half = standard(policy="randaugment", magnitude=4, color_jitter=0.2, hue=0.1, grayscale=0.3, erase=0.4)
    differs = 0
    for position in range(60):
        assert torch.equal(view(whole, position, strength=0.5), view(half, position))
        differs += not torch.equal(view(whole, position), view(half, position))
    assert differs > 30


@pytest.mark.parametrize("policy", ["trivial", "three_augment"])
def test_policies_without_a_magnitude_act_on_a_share(policy):
    augment, untouched = standard(policy=policy, **WHOLE), torch.from_numpy(IMAGE).permute(2, 0, 1)
    full = sum(not torch.equal(view(augment, position), untouched) for position in range(600))
    part = sum(not torch.equal(view(augment, position, strength=0.25), untouched) for position in range(600))
    assert 0.18 < part / full < 0.33


# Recipes --------------------------------------------------------------------------------------


class Recipe(Block):
    augment: one_of("penstock.augment")  # type: ignore[valid-type]


@pytest.mark.parametrize(
    ("options", "key", "words"),
    [
        ({"policy": "trivial", "magnitude": 9}, "augment.magnitude", "has none"),
        ({"policy": "randaugment", "magnitude": 15}, "augment.magnitude", "10"),
        ({"policy": "randaugmnet"}, "augment.policy", "randaugment"),
        ({"scale": [1.0, 0.08]}, "augment.scale", "lower value first"),
        ({"scale": [0.08, 1.5]}, "augment.scale", "at most 1"),
        ({"erase_area": [0.0, 0.3]}, "augment.erase_area", "above 0"),
        ({"crop": "simple", "size": 4}, "augment.pad", "smaller"),
        ({"strength": {"name": "linear", "start": 1.0, "end": -0.5}}, "augment.strength", "below 0"),
        ({"erase": 1.5}, "augment.erase", "1"),
    ],
)
def test_what_cannot_work_is_refused(options, key, words):
    with pytest.raises(InputError) as raised:
        check(Recipe, Source(values={"augment": {"name": "standard", **options}}))
    assert f"{key}:" in str(raised.value) and words in str(raised.value)


def test_a_resolved_recipe_loads_again():
    recipe = check(Recipe, Source(values={"augment": {"name": "standard", "policy": "trivial", "erase": 0.1}}))
    again = check(Recipe, Source(values=recipe.model_dump(mode="json")))
    assert again.augment.model_dump() == recipe.augment.model_dump()


# In a stream ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("stream"), [13, 11], size=(8, 8)).root


def stream_of(folder, policy: str, workers: int) -> TrainStream:
    curve = {"name": "linear", "start": 0.2, "end": 1.0}
    augment = Standard(Standard.Config(size=16, policy=policy, strength=curve, color_jitter=0.3, erase=0.5))
    data = Data.Config(train=folder, workers=workers)
    clock = Clock(total=9, batch=8, epoch=24)
    return TrainStream(data, augment, batch=8, accumulation=1, rank=0, world=1, seed=3, clock=clock)


def taken(stream: TrainStream, since: int, count: int) -> list[torch.Tensor]:
    batches = stream.batches(since=since)
    return [next(batches).views[0] for _ in range(count)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("policy", POLICIES)
def test_workers_and_resumes_change_no_pixel(stored, policy):
    alone = taken(stream_of(stored, policy, 0), 0, 6)
    for workers in (1, 4) if policy == "randaugment" else (2,):
        assert all(map(torch.equal, alone, taken(stream_of(stored, policy, workers), 0, 6)))
    resumed = taken(stream_of(stored, policy, 2), 24, 3)
    assert all(map(torch.equal, alone[3:], resumed))


def test_another_epoch_shows_other_views(stored):
    stream = stream_of(stored, "randaugment", 0)
    seen: dict[str, list[torch.Tensor]] = {}
    batches = stream.batches(since=0)
    for _ in range(9):
        batch = next(batches)
        for key, pixels in zip(batch.keys, batch.views[0], strict=True):
            seen.setdefault(key, []).append(pixels)
    assert len(seen) == 24
    for views in seen.values():
        assert len(views) == 3
        assert not any(torch.equal(views[a], views[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_settings_are_built_once():
    _policies.build.cache_clear()
    augment = standard(policy="randaugment")
    for position in range(30):
        view(augment, position)
    assert _policies.build.cache_info().misses == 1
