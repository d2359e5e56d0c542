"""What every curve promises; a new one is tested the moment it exists."""

import math

import pytest
import yaml

from penstock.recipe import Block, resolved
from penstock.schedule import CURVES, Clock, Knob, Length, trace

CLOCK = Clock(total=100, batch=10, epoch=95)


class Holder(Block):
    knob: Knob


@pytest.fixture(params=sorted(CURVES))
def curve(request):
    return CURVES[request.param](start=2.0, end=0.5, warmup=Length(10, "steps"), warmup_from=0.1)


def test_warm_up_is_a_line_to_the_start(curve):
    for step in range(10):
        assert curve.at(step, CLOCK) == pytest.approx(0.1 + 1.9 * step / 10)
    assert curve.at(10, CLOCK) == pytest.approx(2.0)


def test_values_stay_between_start_and_end_and_stay_put_past_the_end(curve):
    values = [value for _, value in trace({"": curve}, CLOCK, points=100)[""]]
    assert len(values) == 100 and all(math.isfinite(value) for value in values)
    assert all(0.5 - 1e-12 <= value <= 2 + 1e-12 for value in values[10:])
    assert values[10:] == sorted(values[10:], reverse=True)
    assert curve.at(100, CLOCK) == curve.at(101, CLOCK) == curve.at(1e9, CLOCK)


def test_without_a_warm_up_it_begins_at_the_start(curve):
    assert curve.model_copy(update={"warmup": Length(0.0, "steps")}).at(0, CLOCK) == 2.0


def test_a_run_of_one_step(curve):
    assert math.isfinite(curve.at(0, Clock(total=1, batch=10, epoch=95)))


def test_it_is_written_and_read_again(curve):
    text = yaml.safe_dump(resolved(Holder(knob=curve)))
    assert Holder(**yaml.safe_load(text)).knob == curve
