"""The one-cycle curve against torch's scheduler, step by step: the rate and the momentum."""

import pytest
import torch

from penstock.schedule import Clock, Length, OneCycle

TOTAL = 97


@pytest.mark.parametrize("shape", ["cos", "linear"])
@pytest.mark.parametrize("peak", [0.3, 0.25, 0.9])
def test_it_is_torchs(shape, peak):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3.0, total_steps=TOTAL, pct_start=peak, anneal_strategy=shape
    )
    clock = Clock(TOTAL, 8, 100)
    rate = OneCycle(peak=peak, shape_of=shape)  # the defaults are torch's
    momentum = OneCycle(start=0.95, top=0.85, end=0.95, peak=peak, shape_of=shape)
    for step in range(TOTAL):
        group = optimizer.param_groups[0]
        assert 3 * rate.at(step, clock) == pytest.approx(group["lr"], rel=1e-9, abs=1e-12), step
        assert momentum.at(step, clock) == pytest.approx(group["momentum"], rel=1e-9), step
        optimizer.step()
        if step < TOTAL - 1:
            scheduler.step()


def test_extremes():
    clock = Clock(10, 8, 100)
    assert OneCycle(peak=0, end=0.5).at(0, clock) == 1.0  # at the top at once
    assert OneCycle(peak=1.0).at(9, clock) == 1.0  # up to the end
    assert OneCycle(peak=Length(5, "steps")).at(4, clock) == 1.0
    assert OneCycle().at(0, Clock(1, 8, 100)) == pytest.approx(4e-6)
