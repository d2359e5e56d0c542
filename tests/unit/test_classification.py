"""Accuracy, calibration and temperature scaling, beside slow transcriptions and other libraries."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as theirs

from penstock.calibration import LIMITS, calibrate, fit_temperature, halves
from penstock.classification import check_labels, classification_metrics, judge, per_class_accuracy
from penstock.errors import InputError
from penstock.reliability import reliability, reliability_diagram


def answers(samples: int, classes: int, seed: int = 0, spread: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels drawn from just the probabilities they state: perfectly calibrated."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(samples, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def nll(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits.double(), labels).item()


@pytest.mark.parametrize("samples,classes", [(1, 3), (103, 10), (5000, 12)])
def test_metrics_equal_a_slow_transcription(samples, classes):
    logits, labels = answers(samples, classes)
    logits = 2 * logits
    found = classification_metrics(logits, labels)
    right = top5 = surprise = brier = 0.0
    bins = [[0, 0.0, 0.0] for _ in range(15)]
    for row, label in zip(logits.double().numpy(), labels.tolist(), strict=True):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        order = np.argsort(-row)
        right += order[0] == label
        top5 += label in order[:5]
        surprise -= math.log(p[label])
        brier += ((p - np.eye(classes)[label]) ** 2).sum()
        place = min(int(p.max() * 15), 14)
        bins[place][0] += 1
        bins[place][1] += p.max()
        bins[place][2] += order[0] == label
    wanted = {
        "top1": 100 * right / samples,
        "nll": surprise / samples,
        "brier": brier / samples,
        "ece": 100 * sum(abs(confidence - hits) for _, confidence, hits in bins) / samples,
    }
    if classes >= 10:
        wanted["top5"] = 100 * top5 / samples
    assert found == pytest.approx(wanted, rel=1e-9)


def test_metrics_equal_other_libraries():
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, labels = answers(3000, 10)
    logits = 3 * logits
    found, p = classification_metrics(logits, labels), logits.double().softmax(1)
    assert found["nll"] == pytest.approx(theirs.log_loss(labels, p, labels=range(10)))
    assert found["top5"] == pytest.approx(100 * theirs.top_k_accuracy_score(labels, p, k=5, labels=range(10)))
    assert found["brier"] == pytest.approx(((p - torch.eye(10)[labels]) ** 2).sum(1).mean().item())
    error = multiclass_calibration_error(p, labels, 10, n_bins=15, norm="l1").item()
    assert found["ece"] == pytest.approx(100 * error, abs=1e-3)


def test_bfloat16_logits_and_order_do_not_matter():
    logits, labels = answers(500, 10)
    shuffled = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    found = classification_metrics(logits, labels)
    assert classification_metrics(logits[shuffled], labels[shuffled]) == pytest.approx(found, rel=1e-12)
    half = logits.bfloat16()
    assert classification_metrics(half, labels) == classification_metrics(half.float(), labels)


def test_chance_level():
    found = classification_metrics(torch.zeros(1000, 20), torch.arange(1000) % 20)
    assert found["nll"] == pytest.approx(math.log(20)) and found["brier"] == pytest.approx(0.95)
    assert found["top1"] == pytest.approx(5) and found["top5"] == pytest.approx(25) and found["ece"] < 1e-9
    assert "top5" not in classification_metrics(torch.zeros(10, 9), torch.arange(10) % 9)


def test_perfect_answers_and_confident_mistakes():
    logits = 1e4 * torch.eye(10)
    assert classification_metrics(logits, torch.arange(10)) == {
        "top1": 100,
        "top5": 100,
        "nll": 0,
        "ece": 0,
        "brier": 0,
    }
    wrong = classification_metrics(logits, (torch.arange(10) + 1) % 10)
    assert wrong["top1"] == 0 and wrong["ece"] == pytest.approx(100) and wrong["brier"] == pytest.approx(2)
    assert wrong["nll"] == pytest.approx(1e4)


def test_accuracy_of_each_class():
    labels = torch.tensor([0, 0, 0, 2, 2])
    logits = torch.eye(4)[torch.tensor([0, 0, 1, 2, 3])]
    found = per_class_accuracy(logits, labels)
    assert found[0] == pytest.approx(200 / 3) and found[2] == 50
    assert found[[1, 3]].isnan().all()


@pytest.mark.parametrize(
    "labels,keys,words",
    [
        ([0, 12, 3, -1], ["a", "cat/7.jpg", "b", "c"], ["'cat/7.jpg'", "label 12", "10 classes", "1 more"]),
        ([0, 1, -1], ["a", "b", "dog.jpg"], ["'dog.jpg'", "no label"]),
        ([10], None, ["number 0", "label 10", "0 to 9"]),
        ([], None, ["no labelled sample"]),
    ],
)
def test_labels_that_do_not_fit_are_named(labels, keys, words):
    with pytest.raises(InputError) as caught:
        classification_metrics(torch.zeros(len(labels), 10), torch.tensor(labels, dtype=torch.int64), keys)
    assert all(word in str(caught.value) for word in words), caught.value


def test_labels_that_fit_are_good():
    check_labels(torch.tensor([0, 9]), 10)


# Calibration


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_calibrated_answers_have_no_error(classes):
    logits, labels = answers(40_000, classes)
    assert classification_metrics(logits, labels)["ece"] < 1.0
    assert classification_metrics(3 * logits, labels)["ece"] > 5  # overconfident
    assert classification_metrics(logits / 3, labels)["ece"] > 5  # underconfident


def test_bins_hold_every_sample_once():
    confidence = torch.tensor([0.0, 1 / 15, 0.5, 0.999, 1.0])
    bins = reliability(confidence, torch.tensor([True, False, True, True, False]))
    assert bins.samples.sum() == 5
    assert bins.samples[14] == 2 and bins.accuracy[14] == 0.5 and bins.samples[7] == 1
    edges = reliability(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), torch.ones(5), bins=4)
    assert edges.samples.tolist() == [1, 1, 1, 2]  # a lower edge belongs to its bin
    with pytest.raises(InputError, match="not empty"):
        reliability(torch.zeros(0), torch.zeros(0))


@pytest.mark.parametrize("truth", [0.2, 0.7, 1.0, 3.0, 20.0])
def test_a_known_temperature_is_found(truth):
    logits, labels = answers(20_000, 10)
    assert fit_temperature(truth * logits, labels) == pytest.approx(truth, rel=0.03)
    best = fit_temperature(truth * logits, labels)
    for other in (0.99, 1.01):  # the minimum on this data, by looking
        assert nll(truth * logits / best, labels) < nll(truth * logits / (other * best), labels)


def test_the_likelihood_never_falls_on_its_own_data():
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        samples, classes = 2 + seed, 2 + seed % 7
        logits = 10 ** (seed % 5 - 2) * torch.randn(samples, classes, generator=generator)
        labels = torch.randint(0, classes, (samples,), generator=generator)
        temperature = fit_temperature(logits, labels)
        assert LIMITS[0] <= temperature <= LIMITS[1]
        assert nll(logits / temperature, labels) <= nll(logits, labels) + 1e-12


def test_temperatures_of_odd_cases():
    perfect = 5 * torch.eye(6)
    assert fit_temperature(perfect, torch.arange(6)) == pytest.approx(LIMITS[0])
    assert fit_temperature(perfect, (torch.arange(6) + 1) % 6) == pytest.approx(LIMITS[1])
    assert fit_temperature(torch.full((4, 3), 7.0), torch.tensor([0, 1, 2, 0])) == 1.0
    huge, labels = answers(500, 10)
    assert fit_temperature(50 * huge + 1e4, labels) == pytest.approx(fit_temperature(50 * huge, labels), rel=0.02)
    with pytest.raises(InputError, match="not finite"):
        fit_temperature(torch.tensor([[0.0, math.inf]]), torch.tensor([0]))
    with pytest.raises(InputError, match="not empty"):
        fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def test_calibration_is_measured_on_samples_it_was_not_fitted_to():
    logits, labels = answers(8001, 10)
    positions = torch.arange(8001)
    fit, test = halves(positions, seed=3)
    assert len(fit) == 4000 and len(test) == 4001
    assert torch.equal(torch.cat([fit, test]).sort().values, positions)
    found = calibrate(3 * logits, labels, positions, seed=3)
    assert found.temperature == fit_temperature(3 * logits[fit], labels[fit])
    before = classification_metrics(3 * logits[test], labels[test])
    after = classification_metrics(3 * logits[test] / found.temperature, labels[test])
    named = found.metrics
    assert (named["ece_unscaled"], named["nll_unscaled"]) == pytest.approx((before["ece"], before["nll"]))
    assert (named["ece_scaled"], named["nll_scaled"]) == pytest.approx((after["ece"], after["nll"]))
    assert named["ece_unscaled"] > 10 and named["ece_scaled"] < 3
    assert before["top1"] == after["top1"]
    spoiled = labels.clone()
    spoiled[test] = 0
    assert calibrate(3 * logits, spoiled, positions, seed=3).temperature == found.temperature


def test_halves_depend_on_seed_and_positions_alone():
    positions = torch.arange(100, 200)
    shuffled = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    first = set(positions[halves(positions, 0)[0]].tolist())
    assert first == set(positions[shuffled][halves(positions[shuffled], 0)[0]].tolist())
    assert first != set(positions[halves(positions, 1)[0]].tolist())
    with pytest.raises(InputError, match="larger"):
        calibrate(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 0)


@pytest.mark.parametrize("samples", [1, 400])
def test_the_diagram_is_a_picture(samples):
    judged = judge(*answers(samples, 10))
    picture = reliability_diagram(reliability(judged.confidence, judged.correct), "before")
    assert picture.dtype == torch.uint8 and picture.shape[0] == 3 and min(picture.shape[1:]) > 400
    assert (picture == 255).float().mean() > 0.2 and len(picture.unique()) > 20
    other = reliability_diagram(reliability(judged.confidence, ~judged.correct), "before")
    assert not torch.equal(picture, other)
