"""Paired effects: coverage on synthetic runs whose true effect is known, and metrics against independent ones."""

import math

import numpy as np
import pytest

from penstock.errors import InputError
from penstock.paired import Comparison, Predictions

REPEATS = 300


def compare(runs: dict[str, Predictions], *args, **options) -> Comparison:
    return Comparison(runs.items(), *args, **options)


def normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def synthetic(rng, seeds: int, effect: float, seed_sd: float, n: int = 400) -> tuple[dict[str, Predictions], float]:
    """Runs a0.. and b0.. that are right where a normal variable is positive, and the true difference in per cent.

    The variable is the image's ease, shared by all runs, a seed's luck, and noise of image and run; `effect` is a's
    advantage, half of which differs from image to image.
    """
    ease, advantage = rng.normal(0.8, 1, n), rng.normal(effect, 0.3, n)
    labels, runs = rng.integers(0, 2, n), {}
    for seed in range(seeds):
        for side, gain in (("a", advantage), ("b", 0.0)):
            margin = ease + gain + rng.normal(0, seed_sd) + rng.normal(0, 0.5, n)
            logits = np.zeros((n, 2), np.float32)
            logits[np.arange(n), labels] = margin
            runs[f"{side}{seed}"] = Predictions(np.arange(n), labels, logits)
    noise = 1 + seed_sd**2 + 0.5**2
    truth = normal_cdf((0.8 + effect) / math.sqrt(noise + 0.3**2)) - normal_cdf(0.8 / math.sqrt(noise))
    return runs, 100 * truth


def pairs(seeds: int) -> list[tuple[str, str]]:
    return [(f"a{seed}", f"b{seed}") for seed in range(seeds)]


@pytest.mark.parametrize(
    "seeds,effect,seed_sd",
    # 0.034 undoes what the spread of the advantage costs: the true effect is zero
    [(1, 0.1, 0.0), (1, 0.034, 0.0), (3, 0.1, 0.0), (3, 0.034, 0.05), (3, 0.3, 0.2)],
)
def test_the_interval_holds_the_true_effect(seeds, effect, seed_sd):
    inside, truth = 0, math.nan
    for repeat in range(REPEATS):
        runs, truth = synthetic(np.random.default_rng(repeat), seeds, effect, seed_sd)
        found = compare(runs, resamples=500, seed=repeat).effect(pairs(seeds), "top1")
        inside += found.low <= truth <= found.high
    assert 0.92 <= inside / REPEATS <= 0.98, f"{inside} of {REPEATS} hold {truth:.2f}"
    assert abs(truth) < 0.2 or effect != 0.034


def test_calibration_error_is_covered_too():
    """One run that is calibrated, one that is over-confident, against the mean effect on as many other images."""

    def runs(rng, n):
        logits = rng.normal(0, 1.5, (n, 5))
        labels = (logits + rng.gumbel(size=(n, 5))).argmax(1)  # the softmax of the logits is their true probability
        return {side: Predictions(np.arange(n), labels, scale * logits) for side, scale in (("a", 1.0), ("b", 1.5))}

    def effect(key, resamples):
        return compare(runs(np.random.default_rng(key), 2000), resamples).effect([("a", "b")], "ece")

    truth = np.mean([effect(1000 + repeat, 1).value for repeat in range(300)])
    found = [effect(repeat, 500) for repeat in range(150)]
    inside = sum(each.low <= truth <= each.high for each in found) / len(found)
    assert truth < -5
    assert 0.90 <= inside <= 0.99


def test_pairing_narrows_the_interval():
    runs, _ = synthetic(np.random.default_rng(0), 1, 0.1, 0.0, n=4000)
    paired = compare(runs).effect([("a0", "b0")], "top1")
    other = np.random.default_rng(1).permutation(4000)  # the same predictions, but images no longer match
    b = runs["b0"]
    unpaired = compare({"a0": runs["a0"], "b0": Predictions(b.positions, b.labels, shuffled(b, other))})
    assert unpaired.value("b0", "top1") == pytest.approx(compare(runs).value("b0", "top1"))
    wide = unpaired.effect([("a0", "b0")], "top1")
    assert paired.high - paired.low < 0.75 * (wide.high - wide.low)


def shuffled(run: Predictions, order) -> np.ndarray:
    """Logits for the same labels in which each image takes over another's margin."""
    n = np.arange(len(run.labels))
    logits = np.zeros_like(run.logits)
    logits[n, run.labels] = run.logits[n, run.labels][order]
    return logits


def test_metrics_equal_those_of_torch():
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    rng = np.random.default_rng(3)
    labels = rng.integers(0, 7, 501)
    logits = rng.normal(0, 2, (501, 7)).astype(np.float32)
    logits[np.arange(501), labels] += 1
    found = compare({"a": Predictions(np.arange(501), labels, logits)}, resamples=2)
    x, y = torch.from_numpy(logits), torch.from_numpy(labels)
    assert found.value("a", "top1") == pytest.approx(100 * (x.argmax(1) == y).float().mean().item())
    assert found.value("a", "nll") == pytest.approx(torch.nn.functional.cross_entropy(x, y).item(), rel=1e-5)
    assert found.value("a", "ece") == pytest.approx(
        100 * multiclass_calibration_error(x.softmax(1), y, num_classes=7, n_bins=15).item(), rel=1e-4
    )


def test_resamples_equal_a_slow_bootstrap_step():
    """One joint resample, redone image by image."""
    runs, _ = synthetic(np.random.default_rng(5), 1, 0.1, 0.0, n=50)
    comparison = compare(runs, resamples=3, seed=7)
    drawn = np.random.default_rng(7).integers(0, 50, (3, 50))
    for name, run in runs.items():
        for step in range(3):
            chosen = drawn[step]
            again = Predictions(run.positions, run.labels[chosen], run.logits[chosen])
            for row, metric in enumerate(("top1", "ece", "nll")):
                expected = compare({name: again}, resamples=1).value(name, metric)
                assert comparison._resampled[name][row, step] == pytest.approx(expected, rel=1e-4)


def test_flips_are_mcnemars_counts():
    labels = np.zeros(4, int)
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    a = Predictions(np.arange(4), labels, np.array([right, right, right, wrong]))
    b = Predictions(np.arange(4), labels, np.array([right, wrong, wrong, right]))
    assert compare({"a": a, "b": b}, 2).flips([("a", "b")]) == (2, 1)


def test_a_mark_means_that_zero_is_outside():
    runs, _ = synthetic(np.random.default_rng(0), 3, 1.0, 0.0)
    comparison = compare(runs)
    assert comparison.effect(pairs(3), "top1").sure
    same = comparison.effect([("a0", "a0")], "top1")
    assert (same.value, same.low, same.high, same.sure) == (0, 0, 0, False)
    assert compare(runs).effect(pairs(3), "top1") == compare(runs).effect(pairs(3), "top1")


@pytest.mark.parametrize(
    "change,words",
    [
        ({"positions": np.arange(1, 5)}, "different validation images"),
        ({"labels": np.array([0, 1, 1, 0])}, "different validation images"),
        ({"logits": np.zeros((4, 3))}, "2 classes and b 3"),
    ],
)
def test_other_images_are_refused(change, words):
    a = {"positions": np.arange(4), "labels": np.array([0, 1, 0, 1]), "logits": np.zeros((4, 2))}
    with pytest.raises(InputError, match=words):
        compare({"a": Predictions(**a), "b": Predictions(**a | change)})


@pytest.mark.parametrize(
    "arrays,words",
    [
        ({"labels": np.array([0, 2])}, "labels from 0 to 2 for 2 classes"),
        ({"logits": np.array([[0.0, np.nan], [0, 0]])}, "not finite"),
        ({"positions": np.arange(3)}, "disagree"),
        ({"logits": np.zeros(2)}, "disagree"),
        ({"logits": np.array([[{}, 1], [2, 3]], dtype=object)}, "Object arrays cannot be loaded"),
    ],
)
def test_damaged_predictions_are_named(tmp_path, arrays, words):
    good = {"positions": np.arange(2), "labels": np.array([0, 1]), "logits": np.zeros((2, 2), np.float32)}
    path = tmp_path / "predictions.npz"
    np.savez(path, **good)
    assert Predictions.load(path).logits.shape == (2, 2)
    np.savez(path, **good | arrays)
    with pytest.raises(InputError, match=words):
        Predictions.load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="no predictions can be read"):
        Predictions.load(path)
