"""Feature health on features whose state is known."""

import math

import pytest
import torch

from penstock.health import alarms, feature_health

D = 64


def _gaussian(n: int = 2000) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(0))


def test_even_features_are_healthy():
    health = feature_health(_gaussian())
    assert health["std"] == pytest.approx(1 / math.sqrt(D), rel=0.02)
    assert health["spread"] == pytest.approx(1, rel=0.02)
    assert 0.95 * D < health["effective_rank"] <= D
    assert alarms(health, D, loss=3.0, collapse_loss=5.0) == []


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_collapsed_features_raise_an_alarm(noise):
    health = feature_health(3 + noise * _gaussian())
    assert health["spread"] < 1e-3
    (said,) = alarms(health, D)
    assert "collapsed" in said and "try" in said


def test_few_directions_raise_an_alarm():
    plane = _gaussian()[:, :2] @ torch.randn(2, D, generator=torch.Generator().manual_seed(1))
    health = feature_health(plane)
    assert 1.5 < health["effective_rank"] < 2.01 and health["spread"] > 0.5
    (said,) = alarms(health, D)
    assert "few directions" in said


def test_effective_rank_of_known_singular_values():
    columns, _ = torch.linalg.qr(_gaussian(500)[:, :6].double() - _gaussian(500)[:, :6].double().mean(0))
    singular = torch.tensor([4.0, 2, 1, 1, 0, 0], dtype=torch.float64)
    share = singular[:4] / 8
    expected = math.exp(-(share * share.log()).sum())
    assert feature_health(columns * singular)["effective_rank"] == pytest.approx(expected, rel=1e-4)
    wide = (columns * singular).T  # fewer images than dimensions
    assert feature_health(wide)["effective_rank"] < 6


def test_features_that_are_not_finite_and_a_loss_at_its_collapse_value():
    broken = _gaussian()
    broken[3, 5] = torch.inf
    (said,) = alarms(feature_health(broken), D)
    assert "not finite" in said
    (said,) = alarms(feature_health(_gaussian()), D, loss=math.log(127) - 0.01, collapse_loss=math.log(127))
    assert "ignores its input" in said
