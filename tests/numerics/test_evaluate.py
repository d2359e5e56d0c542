"""kNN and the linear probe against brute force, and what must not influence them."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from penstock.errors import InputError
from penstock.evaluate import knn as knn_module
from penstock.evaluate import linear as linear_module
from penstock.evaluate._features import FeatureSet, keyed_order
from penstock.evaluate.knn import KNN, neighbours
from penstock.evaluate.linear import LinearProbe, draw_labels


@pytest.fixture
def quick(monkeypatch):
    """For tests whose probes need not converge."""
    monkeypatch.setattr(linear_module, "LEAST_STEPS", 100)


def features(n: int, dim: int = 12, classes: int = 5, gap: float = 1.0, seed: int = 0) -> FeatureSet:
    """Gaussian classes whose centres are `gap` apart from the origin in random directions."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    x = torch.randn(n, dim, generator=generator) + gap * centres[labels]
    return FeatureSet(x, labels, torch.arange(n) * 3 + seed)


def brute_force(train: FeatureSet, val: FeatureSet, k: int, temperature: float) -> float:
    """One query at a time, sorting the whole bank in NumPy; equals keep the bank's order."""
    bank, queries = (
        (part.features / part.features.norm(dim=1, keepdim=True)).double().numpy() for part in (train, val)
    )
    labels = train.labels.numpy()
    correct = 0
    for query, truth in zip(queries, val.labels.tolist(), strict=True):
        similarity = bank @ query
        nearest = np.argsort(-similarity, kind="stable")[:k]
        votes = np.zeros(labels.max() + 1)
        for row in nearest:
            votes[labels[row]] += np.exp(similarity[row] / temperature)
        correct += int(votes.argmax() == truth)
    return 100 * correct / len(val)


@pytest.mark.parametrize("k", [1, 5, 20, 1000])
def test_knn_equals_brute_force(k, monkeypatch):
    monkeypatch.setattr(knn_module, "BANK", 64)  # several chunks, the last one small
    monkeypatch.setattr(knn_module, "QUERIES", 50)
    train, val = features(300), features(120, seed=1)
    got = KNN(KNN.Config(k=k))(train, val)["knn_top1"]
    assert got == pytest.approx(brute_force(train, val, k, 0.07), abs=1e-9)
    assert 40 < got < 100


def test_knn_of_one_hot_features_is_perfect_and_of_random_labels_is_chance():
    labels = torch.arange(200) % 10
    one_hot = FeatureSet(torch.eye(10)[labels], labels, torch.arange(200))
    assert KNN(KNN.Config())(one_hot, one_hot)["knn_top1"] == 100
    train, val = features(2000, gap=0, classes=10), features(2000, gap=0, classes=10, seed=1)
    assert KNN(KNN.Config())(train, val)["knn_top1"] == pytest.approx(10, abs=2.5)


def test_collapsed_features_do_not_score():
    labels = torch.arange(400) % 10
    same = FeatureSet(torch.ones(400, 8), labels, torch.arange(400))
    found = LinearProbe(LinearProbe.Config(labels_per_class=()))(same, same) | KNN(KNN.Config())(same, same)
    assert found["linear_top1"] == pytest.approx(10) and found["knn_top1"] == pytest.approx(10)
    assert found["linear_top5"] == pytest.approx(50)


def test_equal_neighbours_are_taken_in_order(monkeypatch):
    monkeypatch.setattr(knn_module, "BANK", 7)
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(20, 1)
    similarity, rows = neighbours(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), bank, 6)
    assert rows.tolist() == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
    assert similarity.eq(1).all()


def test_equal_neighbours_do_not_depend_on_how_topk_chooses(monkeypatch):
    def last_first(values: torch.Tensor, k: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        best, index = values.flip(dim).sort(dim=dim, descending=True, stable=True)
        return best[:, :k], values.shape[dim] - 1 - index[:, :k]

    bank = (torch.arange(60) % 3).float()[:, None]
    expected = (-bank[:, 0]).sort(stable=True).indices[:30]
    monkeypatch.setattr(torch.Tensor, "topk", last_first)
    assert torch.equal(neighbours(torch.ones(1, 1), bank, 30)[1][0], expected)


def test_bank_is_a_fixed_draw():
    train, val = features(500), features(100, seed=1)
    draw = keyed_order(train, 0)[:60].sort().values
    expected = brute_force(train.rows(draw), val, 10, 0.07)
    shuffled = train.rows(torch.randperm(500))
    for part in (train, shuffled):
        assert KNN(KNN.Config(k=10, bank=60))(part, val)["knn_top1"] == pytest.approx(expected)


def test_probe_separates_what_is_separable():
    train, val = features(600, gap=6.0), features(200, gap=6.0, seed=1)
    assert LinearProbe(LinearProbe.Config(draws=3))(train, val)["linear_top1"] == 100


def test_probe_reaches_logistic_regression_on_badly_conditioned_features():
    mix = torch.randn(12, 40, generator=torch.Generator().manual_seed(3)) * torch.logspace(0, -2.5, 12)[:, None]
    train, val = (
        FeatureSet(part.features @ mix + 3, part.labels, part.positions)
        for part in (features(1500, gap=0.7), features(1000, gap=0.7, seed=1))
    )
    mean, std = train.features.mean(0), train.features.std(0)
    x, y = ((part.features - mean) / std for part in (train, val))
    reference = max(
        LogisticRegression(C=c, max_iter=2000).fit(x.numpy(), train.labels.numpy()).score(y.numpy(), val.labels.numpy())
        for c in (0.1, 10, 1000)
    )
    got = LinearProbe(LinearProbe.Config(labels_per_class=()))(train, val)
    assert got["linear_top1"] >= 100 * reference - 1.5, (got, reference)


def test_probe_is_deterministic_and_leaves_the_generators_alone(quick):
    train, val = features(300), features(100, seed=1)
    probe = LinearProbe(LinearProbe.Config(draws=3))
    before = torch.get_rng_state()
    first = probe(train, val)
    assert torch.equal(torch.get_rng_state(), before)
    assert probe(train, val) == first


def test_setting_is_chosen_without_the_validation_set(quick):
    train, val = features(300), features(100, seed=1)
    probe = LinearProbe(LinearProbe.Config(labels_per_class=()))
    fair = probe(train, val)
    scrambled = probe(train, FeatureSet(val.features.flip(0), (val.labels + 1) % 5, val.positions))
    assert scrambled["linear_top1"] < 40 < fair["linear_top1"]
    for name in ("linear_lr", "linear_whitened"):
        assert scrambled[name] == fair[name]


def test_draws_of_labels_are_reproducible_balanced_and_differ():
    train = features(300, classes=7)
    draws = [draw_labels(train, 3, seed=0, draw=n) for n in range(4)]
    for draw in draws:
        assert train.labels[draw].bincount().tolist() == [3] * 7
    assert len({tuple(draw.tolist()) for draw in draws}) == 4
    assert torch.equal(draws[1], draw_labels(train, 3, seed=0, draw=1))
    shuffled = train.rows(torch.randperm(300))  # the samples, not their rows, are drawn
    again = shuffled.positions[draw_labels(shuffled, 3, seed=0, draw=1)]
    assert torch.equal(again, train.positions[draws[1]])


def test_few_label_figure_equals_probes_trained_one_by_one(quick):
    train, val = features(300, gap=2.0), features(400, gap=2.0, seed=1)
    found = LinearProbe(LinearProbe.Config(labels_per_class=(1, 5), draws=4))(train, val)
    mean, std = train.features.double().mean(0), train.features.double().std(0, correction=0)
    x, y = ((part.features - mean) / std for part in (train, val))
    for shots in (1, 5):
        scores = []
        for draw in range(4):
            rows = draw_labels(train, shots, 0, draw)
            weight, bias = torch.zeros(12, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
            weight.requires_grad_(), bias.requires_grad_()
            optimizer = torch.optim.SGD([weight, bias], lr=4 / 12, momentum=0.9)
            curve = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
            for _ in range(300):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(x[rows] @ weight + bias, train.labels[rows]).backward()
                optimizer.step()
                curve.step()
            scores.append(100 * ((y @ weight + bias).argmax(1) == val.labels).double().mean().item())
        assert found[f"linear_top1_{shots}_per_class"] == pytest.approx(np.mean(scores), abs=0.3)
        assert found[f"linear_top1_{shots}_per_class_std"] == pytest.approx(np.std(scores), abs=0.3)
    assert found["linear_top1_1_per_class"] < found["linear_top1_5_per_class"] < found["linear_top1"] + 1


@pytest.mark.parametrize("evaluation", [KNN, LinearProbe])
def test_missing_labels_and_empty_sets_are_refused(evaluation):
    good = features(50)
    part = FeatureSet(good.features, torch.where(torch.arange(50) < 7, -1, good.labels), good.positions)
    empty = good.rows(torch.arange(0))
    with pytest.raises(InputError, match=r"needs labels, but 7 of 50 samples of the training set"):
        evaluation(evaluation.Config())(part, good)
    with pytest.raises(InputError, match="validation set has no readable sample"):
        evaluation(evaluation.Config())(good, empty)


def test_more_labels_than_a_class_has_are_refused():
    train = features(60)
    fewest = int(train.labels.bincount().min())
    probe = LinearProbe(LinearProbe.Config(labels_per_class=(fewest + 1,)))
    with pytest.raises(InputError, match=f"take at most {fewest}"):
        probe(train, train)
