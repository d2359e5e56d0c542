"""What every evaluation promises; a new file in `penstock/evaluate` is tested the moment it exists."""

import math
import re

import pytest
import torch

from penstock.errors import InputError
from penstock.evaluate import EVALUATIONS
from penstock.evaluate._features import FeatureSet


def sets() -> tuple[FeatureSet, FeatureSet]:
    """Three classes around three directions, with noise: neither perfect nor chance."""
    made = []
    for seed, samples in ((0, 90), (1, 45)):
        draw = torch.Generator().manual_seed(seed)
        labels = torch.arange(samples) % 3
        features = torch.eye(3, 8)[labels] + 0.6 * torch.randn(samples, 8, generator=draw)
        made.append(FeatureSet(features, labels, torch.arange(samples)))
    return made[0], made[1]


def measure(rank: int, world: int, name: str) -> dict[str, float]:
    kind = EVALUATIONS.get(name)
    torch.manual_seed(rank)
    return kind(kind.Config())(*sets())


@pytest.fixture(params=EVALUATIONS.names())
def name(request) -> str:
    return request.param


def test_options_have_working_defaults(name):
    config = EVALUATIONS.get(name).Config()
    assert config.name == name
    assert config.every is None or config.every.amount > 0  # the monitor asks for it


def test_figures_are_finite_repeatable_and_leave_inputs_and_generators_alone(name):
    generator, before = torch.get_rng_state(), sets()
    kind = EVALUATIONS.get(name)
    train, val = sets()
    once, again = kind(kind.Config())(train, val), kind(kind.Config())(train, val)
    assert once == again and once
    assert torch.equal(torch.get_rng_state(), generator)
    for metric, value in once.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric) and isinstance(value, float) and math.isfinite(value)
    assert any("top1" in metric and 100 / 3 < value < 100 for metric, value in once.items())
    for now, then in zip((train, val), before, strict=True):
        assert torch.equal(now.features, then.features) and torch.equal(now.labels, then.labels)


def test_the_number_of_ranks_changes_nothing(name, ranks):
    alone = measure(0, 1, name)
    for figures in ranks(2).run(measure, name):
        assert figures == pytest.approx(alone, abs=1e-9)


def test_sets_without_labels_are_refused(name):
    train, val = sets()
    bare = FeatureSet(train.features, torch.full_like(train.labels, -1), train.positions)
    kind = EVALUATIONS.get(name)
    with pytest.raises(InputError, match="label"):
        kind(kind.Config())(bare, val)
