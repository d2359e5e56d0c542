"""Mixup and CutMix: targets say what the pixels show, on any number of ranks."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target

from penstock import keyed
from penstock.errors import InputError
from penstock.mixing import DRAWS, MIX, Mixing, symmetric_beta
from penstock.recipe import Block, Source, check
from penstock.schedule import Clock, value_at

ON = {"mixup": 0.8, "cutmix": 1.0, "mix_prob": 1.0}


def owners(count: int, height: int = 13, width: int = 7, dtype=torch.float32) -> torch.Tensor:
    """Images that say whose pixels they are: channel i of image i is 1, the others are 0."""
    return torch.eye(count, dtype=dtype)[:, :, None, None].repeat(1, 1, height, width)


def mix(images, targets=None, positions=None, weights=None, knobs=ON, seed=0, batch_key=0, **options):
    count = len(images)
    return Mixing(Mixing.Config(**options), seed)(
        images,
        torch.eye(count) if targets is None else targets,
        torch.arange(count) if positions is None else positions,
        torch.ones(count) if weights is None else weights,
        knobs,
        batch_key,
    )


def knobs(mixup=0.0, cutmix=0.0, prob=1.0):
    return {"mixup": mixup, "cutmix": cutmix, "mix_prob": prob}


def slowly(images, targets, positions, weights, config, values, seed, batch_key):
    """The same, sample by sample and pixel by pixel."""
    count, _, height, width = images.shape
    mixed, wanted = images.clone(), targets.clone()
    for i in range(count):
        j = (i + count // 2) % count
        name = int(positions[i]) if config.mode == "sample" else batch_key
        u = keyed.uniform(seed, MIX, torch.tensor([name]), DRAWS)[0].double().tolist()
        if u[0] >= values["mix_prob"] or not weights[i] or not weights[j]:
            continue
        both = values["mixup"] > 0 and values["cutmix"] > 0
        cut = u[1] < config.switch if both else values["cutmix"] > 0
        a = values["cutmix"] if cut else values["mixup"]
        t = math.sqrt(2 * a * ((1 - u[2]) ** (-1 / a) - 1)) * math.cos(2 * math.pi * u[3])  # Student, 2a degrees
        kept = 0.5 + 0.5 * t / math.sqrt(2 * a + t * t)
        if not cut:
            mixed[i] = kept * images[i] + (1 - kept) * images[j]
            wanted[i] = kept * targets[i] + (1 - kept) * targets[j]
            continue
        high, wide = round(math.sqrt(1 - kept) * height), round(math.sqrt(1 - kept) * width)
        top, left = math.floor(u[4] * height) - high // 2, math.floor(u[5] * width) - wide // 2
        pasted = 0
        for row in range(max(top, 0), min(top + high, height)):
            for column in range(max(left, 0), min(left + wide, width)):
                mixed[i, :, row, column] = images[j, :, row, column]
                pasted += 1
        share = pasted / (height * width)
        wanted[i] = (1 - share) * targets[i] + share * targets[j]
    return mixed, wanted


@pytest.mark.parametrize("mode", ["sample", "batch"])
@pytest.mark.parametrize("count", [2, 7, 16])
@pytest.mark.parametrize("values", [ON, knobs(mixup=0.2), knobs(cutmix=1.0), ON | {"mix_prob": 0.5}])
def test_equals_a_slow_transcription(mode, count, values):
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, 12, 9, generator=generator)
    targets = torch.rand(count, 5, generator=generator)
    positions = torch.randperm(1000, generator=generator)[:count]
    weights = torch.ones(count)
    weights[count // 2 :: 5] = 0
    config = Mixing.Config(mode=mode, switch=0.4)
    for key in range(3):
        got = mix(images, targets, positions + key, weights, values, 3, key, mode=mode, switch=0.4)
        wanted = slowly(images, targets, positions + key, weights, config, values, 3, key)
        torch.testing.assert_close(got[0], wanted[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(got[1], wanted[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("values", [knobs(), knobs(mixup=0.8, cutmix=1.0, prob=0.0)])
def test_off_returns_the_very_tensors(values):
    images, targets = owners(4), torch.eye(4)
    mixed = mix(images, targets, knobs=values)
    assert mixed[0] is images and mixed[1] is targets


def test_a_single_sample_has_no_partner():
    images, targets = owners(1), torch.eye(1)
    assert mix(images, targets)[0] is images


@pytest.mark.parametrize("mode", ["sample", "batch"])
@pytest.mark.parametrize("size", [(13, 7), (1, 1), (32, 32)])
def test_cutmix_targets_are_the_share_of_pixels_to_the_last_one(mode, size):
    for key in range(20):
        images, targets = mix(
            owners(8, *size), positions=torch.arange(8) + 8 * key, knobs=knobs(cutmix=1.0), batch_key=key, mode=mode
        )
        assert set(images.unique().tolist()) <= {0.0, 1.0}
        pixels = images.sum((2, 3), dtype=torch.float64)  # counted
        assert torch.equal((targets.double() * size[0] * size[1]).round(), pixels)
        torch.testing.assert_close(targets.double(), pixels / (size[0] * size[1]), atol=1e-7, rtol=0)
        kept = targets.diagonal()
        assert torch.equal(kept, (pixels.diagonal().float() / (size[0] * size[1])))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
def test_mixup_targets_are_what_the_pixels_show(dtype, tolerance):
    images, targets = mix(owners(8, dtype=dtype), knobs=knobs(mixup=0.8), mode="sample")
    assert images.dtype == dtype and targets.dtype == torch.float32
    assert torch.equal(targets.diagonal().to(dtype), images.diagonal()[0, 0])  # rounded once, for both
    torch.testing.assert_close(targets, images[:, :, 0, 0].float(), atol=tolerance, rtol=0)
    torch.testing.assert_close(targets.sum(1), torch.ones(8), atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 0.8, 1.0, 2.0, 5.0])
def test_shares_follow_the_beta_distribution(alpha):
    draws = keyed.uniform(1, 2, torch.arange(20_000), 2)
    shares = symmetric_beta(draws[:, 0], draws[:, 1], alpha).numpy()
    # Shares next to 1 are rounded to it, those next to 0 are not: look at the lower half, and at the balance.
    lower = shares[shares < 0.5]
    assert stats.kstest(lower, lambda x: 2 * stats.beta.cdf(x, alpha, alpha)).pvalue > 1e-3
    assert stats.binomtest(len(lower), len(shares)).pvalue > 1e-3
    assert stats.kstest(lower, lambda x: 2 * stats.beta.cdf(x, 1.3 * alpha, 1.3 * alpha)).pvalue < 1e-3  # it can tell


def test_extreme_draws_give_shares_all_the_same():
    ends = torch.tensor([0.0, 0.0, 1 - 2**-24, 1 - 2**-24, 0.5])
    angles = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.25])
    for alpha in (0.001, 0.1, 1.0, 1000.0):
        shares = symmetric_beta(ends, angles, alpha)
        assert ((shares >= 0) & (shares <= 1)).all()


def test_boxes_are_as_large_as_timms():
    """The mean share kept after clipping; that of the raw draws is 0.5."""
    count = 6000
    images, targets = torch.zeros(count, 1, 32, 32), torch.arange(count)[:, None] < count // 2
    mixed = mix(images, targets.float(), torch.arange(count), knobs=knobs(cutmix=1.0), mode="sample")[1]
    kept = torch.where(targets, mixed, 1 - mixed).mean().item()
    generator = np.random.default_rng(0)
    theirs = [cutmix_bbox_and_lam((1, 1, 32, 32), generator.beta(1, 1))[1] for _ in range(count)]
    assert kept == pytest.approx(sum(theirs) / count, abs=0.015)
    assert kept > 0.6


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_the_number_of_ranks_changes_nothing(mode):
    count, begin, seen = 24, 480, {}
    images, targets = torch.randn(count, 3, 8, 8), torch.rand(count, 4)
    for world in (1, 2, 3, 4, 6):
        parts = [torch.arange(rank, count, world) for rank in range(world)]
        mixed = [mix(images[p], targets[p], begin + p, batch_key=begin, mode=mode) for p in parts]
        order = torch.cat(parts).argsort()
        seen[world] = [torch.cat([m[side] for m in mixed])[order] for side in (0, 1)]
    for world in (2, 3, 4, 6):
        assert torch.equal(seen[1][0], seen[world][0]) and torch.equal(seen[1][1], seen[world][1])
    assert not torch.equal(seen[1][0], images)


@pytest.mark.parametrize("count", range(2, 10))
def test_nobody_is_their_own_partner(count):
    targets = mix(owners(count), knobs=knobs(mixup=1.0), mode="sample")[1]
    others = targets - torch.diag(targets.diagonal())
    assert ((others > 0).sum(1) == 1).all()  # exactly one partner
    assert ((others > 0).sum(0) == 1).all()  # and everyone is one


@pytest.mark.parametrize("world", [1, 2, 4])
def test_repeats_of_a_sample_are_not_mixed_with_each_other(world):
    positions = torch.arange(0, 96, world)
    sample = positions // 3  # repeated augmentation: three neighbours are one image
    assert (sample != sample.roll(-(len(sample) // 2))).all()
    targets = mix(owners(len(sample)), positions=positions, knobs=knobs(mixup=1.0), mode="sample")[1]
    partner = (targets - torch.diag(targets.diagonal())).argmax(1)
    assert (sample != sample[partner]).all()


def test_samples_that_do_not_count_are_left_out_of_the_mix():
    weights = torch.ones(8)
    weights[3] = 0
    targets = mix(owners(8), weights=weights, knobs=knobs(mixup=1.0), mode="sample")[1]
    assert torch.equal(targets[3], torch.eye(8)[3]) and torch.equal(targets[:, 3], torch.eye(8)[:, 3])
    assert torch.equal(targets[7], torch.eye(8)[7])  # their partner stays whole
    assert (targets.diagonal()[[0, 1, 2, 4, 5, 6]] < 1).all()


def test_the_two_of_a_pair_draw_for_themselves():
    shares = torch.stack(
        [
            mix(owners(2), positions=torch.tensor([p, p + 1]), knobs=knobs(mixup=1.0), mode="sample")[1].diagonal()
            for p in range(0, 1000, 2)
        ]
    )
    assert abs(torch.corrcoef(shares.T)[0, 1]) < 0.15


def test_draws_differ_by_seed_sample_and_batch():
    first = mix(owners(8), mode="sample")[1]
    assert torch.equal(first, mix(owners(8), mode="sample")[1])
    assert not torch.equal(first, mix(owners(8), mode="sample", seed=1)[1])
    assert not torch.equal(first, mix(owners(8), mode="sample", positions=torch.arange(8) + 8)[1])
    batch = mix(owners(8), mode="batch")[1]
    assert torch.equal(batch, mix(owners(8), mode="batch", positions=torch.arange(8) + 8)[1])
    assert not torch.equal(batch, mix(owners(8), mode="batch", batch_key=8)[1])
    assert len(batch.diagonal().unique()) == 1 and len(first.diagonal().unique()) == 8


def test_autocast_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(8, 3, 9, 9, generator=generator), torch.rand(8, 4, generator=generator)
    plain = mix(images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        under = mix(images, targets)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


def test_prob_and_switch_are_shares_of_the_samples():
    count = 4000
    images, targets = torch.randn(count, 1, 8, 8), torch.eye(2).repeat_interleave(count // 2, 0)
    mixed, _ = mix(images, targets, torch.arange(count), knobs=ON | {"mix_prob": 0.3}, mode="sample", switch=0.25)
    touched = (mixed != images).flatten(1)
    assert touched.any(1).float().mean().item() == pytest.approx(0.3, abs=0.03)
    blended = touched.all(1) & ~(mixed == images.roll(-count // 2, 0)).flatten(1).any(1)
    assert blended.float().mean().item() == pytest.approx(0.3 * 0.75, abs=0.03)


def test_targets_equal_timms():
    labels, shares = torch.tensor([1, 3]), []
    for key in range(5):
        smooth = torch.full((2, 5), 0.1 / 5)
        smooth[torch.arange(2), labels] += 0.9
        _, targets = mix(torch.zeros(2, 1, 4, 4), smooth, knobs=knobs(mixup=0.8), batch_key=key)
        lam = ((targets[0, 1] - 0.02) / 0.9).item()
        torch.testing.assert_close(targets, mixup_target(labels, 5, lam, smoothing=0.1), atol=1e-6, rtol=0)
        shares.append(lam)
    assert len(set(shares)) == 5


class Recipe(Block):
    mix: Mixing.Config = Mixing.Config()


@pytest.mark.parametrize(
    "block,words",
    [
        ({"mixup": 0.8, "label_smoothing": 0.1}, ["mix", "label_smoothing", "loss.smoothing"]),
        ({"mixup": -1}, ["mix.mixup", "negative"]),
        ({"prob": 1.5}, ["mix.prob", "between 0 and 1"]),
        ({"prob": {"name": "linear", "start": 1.0, "end": 3.0}}, ["mix.prob", "reaches 3"]),
        ({"mixup": {"name": "cosine", "start": 0.8, "end": -1.0}}, ["mix.mixup", "reaches -1"]),
        ({"cutmix": {"name": "step", "start": 1.0, "milestones": [0.5], "values": [-0.5]}}, ["cutmix", "reaches -0.5"]),
        ({"auto": True, "cutmix": 1.0}, ["mix.cutmix", "mix.auto=false"]),
        ({"mode": "pair"}, ["mix.mode", "sample", "batch"]),
    ],
)
def test_what_cannot_work_is_refused(block, words):
    with pytest.raises(InputError) as caught:
        check(Recipe, Source({"mix": block}))
    assert "1 mistake:" in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_mixing_ends_before_the_run_does():
    clock = Clock(total=100, batch=8, epoch=80)
    config = Mixing.Config(
        mixup=0.2, prob={"name": "linear", "start": 0.0, "end": 1.0}, off_for_last="1 epoch", cutmix=1.0
    )
    prob = config.knobs()["mix_prob"]
    assert value_at(prob, 89, clock) == pytest.approx(0.89)
    assert [value_at(prob, time, clock) for time in (90, 99, 100)] == [0, 0, 0]
    assert config.knobs().keys() == ON.keys()
    assert value_at(Mixing.Config(mixup=0.2).knobs()["mix_prob"], 99, clock) == 1.0


@pytest.mark.parametrize(
    "millions,epochs,mixup,cutmix",
    [
        (11.7, 100, 0.0, 0.0),  # ResNet-18
        (11.7, 600, 0.0, 0.0),
        (25.6, 16, 0.0, 0.0),  # FFCV's shortest
        (25.6, 100, 0.1, 1.0),  # ResNet strikes back A3
        (25.6, 300, 0.1, 1.0),  # A2
        (25.6, 600, 0.2, 1.0),  # A1
        (86.6, 300, 0.8, 1.0),  # DeiT-B
        (86.6, 100, 0.8, 1.0),  # MAE finetuning
        (304, 50, 0.8, 1.0),
        (304, 5, 0.0, 0.0),
    ],
)
def test_auto_follows_the_published_recipes(millions, epochs, mixup, cutmix):
    config, chosen = Mixing.Config(auto=True, mode="sample").chosen(millions, epochs)
    assert (config.mixup, config.cutmix, config.auto, config.mode) == (mixup, cutmix, False, "sample")
    assert f"mixup {mixup:g}" in chosen and "parameters" in chosen
    given = Mixing.Config(mixup=0.3)
    assert given.chosen(millions, epochs) == (given, "")
