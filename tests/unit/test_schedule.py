"""Curves against formulas written out, durations in every unit, and intervals without gaps."""

import math

import pytest

from penstock.schedule import (
    Clock,
    Constant,
    Cosine,
    Curves,
    Length,
    Linear,
    Polynomial,
    Step,
    WarmupStableDecay,
    knobs_of,
    trace,
    value_at,
)
from pretrain.methods.mae import MAE

# 10 steps of warm-up in a run of 110, so that 100 steps are left for the curve.
CLOCK = Clock(total=110, batch=8, epoch=100)
ENDS = {"start": 2.0, "end": 0.5, "warmup": Length(10, "steps"), "warmup_from": 0.2}

AFTER_WARMUP = {  # value `n` of 100 steps after the warm-up
    "constant": (Constant(**ENDS), lambda n: 2.0),
    "linear": (Linear(**ENDS), lambda n: 2.0 - 1.5 * n / 100),
    "cosine": (Cosine(**ENDS), lambda n: 1.25 + 0.75 * math.cos(math.pi * n / 100)),
    "poly": (Polynomial(**ENDS, power=3), lambda n: 0.5 + 1.5 * ((100 - n) / 100) ** 3),
    "wsd linear": (
        WarmupStableDecay(**ENDS, decay=Length(22, "steps")),
        lambda n: 2.0 if n <= 78 else 2.0 - 1.5 * (n - 78) / 22,
    ),
    "wsd cosine": (
        WarmupStableDecay(**ENDS, decay=Length(20, "%"), decay_shape="cosine"),
        lambda n: 2.0 if n <= 78 else 1.25 + 0.75 * math.cos(math.pi * (n - 78) / 22),
    ),
    "wsd sqrt": (
        WarmupStableDecay(**ENDS, decay=Length(22, "steps"), decay_shape="sqrt"),
        lambda n: 2.0 if n <= 78 else 2.0 - 1.5 * math.sqrt((n - 78) / 22),
    ),
    "step": (
        Step(**ENDS, milestones=[Length(40, "steps"), Length(50, "%")], factor=0.5),
        lambda n: 2.0 if n < 30 else 1.0 if n < 45 else 0.5,
    ),
    "step values": (
        Step(**ENDS, milestones=[Length(40, "steps"), Length(50, "%")], values=[7.0, 9.0]),
        lambda n: 2.0 if n < 30 else 7.0 if n < 45 else 9.0,
    ),
}


@pytest.mark.parametrize("name", AFTER_WARMUP)
def test_curves_are_their_formulas(name):
    curve, formula = AFTER_WARMUP[name]
    assert curve.at(0, CLOCK) == pytest.approx(0.2)
    assert curve.at(9, CLOCK) == pytest.approx(0.2 + 1.8 * 9 / 10)
    for step in range(10, 111):
        assert curve.at(step, CLOCK) == pytest.approx(formula(step - 10), abs=1e-9), step
    assert curve.at(111, CLOCK) == curve.at(1000, CLOCK) == pytest.approx(formula(100), abs=1e-9)


@pytest.mark.parametrize(
    "text,steps",
    [
        ("500 steps", 500),
        ("1 step", 1),
        ("2 epochs", 25),
        ("1e3 samples", 125),
        ("0.5 epoch", 6.25),
        ("10%", 11),
        (0.1, 11),
        (1.0, 110),
        (0, 0),
        ("1.5e1 Epochs", 187.5),
    ],
)
def test_durations(text, steps):
    length = Length.parse(text)
    assert CLOCK.steps(length) == pytest.approx(steps)
    assert CLOCK.steps(Length.parse(str(length))) == pytest.approx(steps)  # as a saved recipe writes it


@pytest.mark.parametrize("text", ["10 weeks", "epochs", 5, 1.5, -0.1, True, "-3 epochs", "1e", None, "1..5 steps", ""])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match=r"duration|float"):
        Length.parse(text)


@pytest.mark.parametrize("text,total", [("10 epochs", 125), ("1 samples", 1), ("1001 samples", 126), ("7 steps", 7)])
def test_a_run_ends_at_the_step_that_completes_its_length(text, total):
    assert Clock.of(Length.parse(text), batch=8, epoch=100).total == total


def test_a_run_cannot_be_a_share_of_itself():
    with pytest.raises(ValueError, match="fraction of itself"):
        Clock.of(Length.parse("50%"), batch=8, epoch=100)


@pytest.mark.parametrize("text", ["1 step", "3 steps", "1 epoch", "0.3 epochs", "77 samples", "7%", "100%"])
def test_intervals_have_neither_gaps_nor_doubles(text):
    clock, length = Clock(total=1000, batch=8, epoch=100), Length.parse(text)
    every = clock.steps(length)
    due = [step for step in range(1, 1001) if clock.tick(step, step * 8, (step - 1) * 8).every(length)]
    want = [math.ceil(i * every - 1e-6) for i in range(1, 1001) if i * every <= 1000 + 1e-6]
    assert due == want


def test_an_interval_shorter_than_a_step_is_due_at_each_and_none_never():
    ticks = [CLOCK.tick(step, step * CLOCK.batch, (step - 1) * CLOCK.batch) for step in range(1, 20)]
    assert all(tick.every(Length.parse("1 samples")) for tick in ticks)
    assert not any(tick.every(Length.parse(0)) or tick.every(None) for tick in ticks)


def test_curves_of_a_run_know_scales_plain_numbers_and_nothing_else():
    curves = Curves({"lr": Cosine(), "weight_decay": 0.1}, CLOCK, scale={"lr": lambda batch: batch / 2})
    for applied in (0, 55, 110):
        lr = 2 + 2 * math.cos(math.pi * applied / 110)
        assert curves.at(applied, 8) == pytest.approx({"lr": lr, "weight_decay": 0.1})
    assert curves.at(55, 16)["lr"] == 2 * curves.at(55, 8)["lr"]


def test_knobs_are_the_fields_that_may_follow_a_curve():
    config = MAE.Config(mask_ratio={"name": "linear", "start": 0.5, "end": 0.75})
    assert list(knobs_of(config)) == ["mask_ratio"]
    assert value_at(knobs_of(config)["mask_ratio"], 55, CLOCK) == pytest.approx(0.625)
    assert value_at(3, 55, CLOCK) == 3.0


def test_trace_runs_from_first_to_last_step():
    points = trace({"lr": Linear()}, CLOCK, points=5)["lr"]
    assert [step for step, _ in points] == [0, 27, 54, 82, 109]
    assert trace({"lr": Linear()}, Clock(1, 1, 1))["lr"] == [(0, 1.0)]
