"""Early stopping: which way is better, patience, what counts as a gain, over a resume and over ranks."""

import json
import math
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.recipe import ACCURACY_METRICS, accuracy_is_measured_to_stop_early
from penstock.errors import InputError
from penstock.monitor import Monitor, StopEarly
from penstock.schedule import Clock, Length
from penstock.stage import early_stopping_has_measurements
from tests.shards import write_set

CLOCK = Clock(total=100, batch=1, epoch=10)


class Scripted:
    """A measure with a value for each step, None where nothing is measured."""

    def __init__(self, values: Sequence[float | None], name: str = "eval/top1"):
        self.values, self.name = values, name

    def __call__(self, tick) -> dict[str, float]:
        value = self.values[tick.step]
        return {} if value is None else {self.name: value}

    def alarms(self) -> list[str]:
        return []


class Tracked:
    def log(self, step, metrics) -> None: ...

    def event(self, name, step, **data) -> None: ...


def monitor(values: Sequence[float | None], kept: list[int], **config: Any) -> Monitor:
    block = Monitor.Config(pictures=None, stop_early=StopEarly.Config(**config))
    return Monitor(block, [Scripted(values)], Tracked(), dict, kept.append)  # type: ignore[arg-type]


def ended(watch: Monitor, first: int, last: int) -> int | None:
    """The step after which the run is told to end."""
    for step in range(first, last):
        if watch.observe(CLOCK.tick(step, step, max(step - 1, 0))):
            return step
    return None


@pytest.mark.parametrize(
    ("metric", "less"),
    [
        ("eval/top1", False),
        ("eval/knn_top1", False),
        ("eval/linear_top1_recent", False),  # holds the letters of ece
        ("eval/nll", True),
        ("eval/ece_scaled", True),
        ("eval/brier", True),
        ("train/loss", True),
        ("eval/error", True),
    ],
)
def test_which_way_is_better_goes_by_the_name(metric, less):
    early = StopEarly(StopEarly.Config(metric=metric))
    assert early.better(5.0)
    assert early.better(4.0) == less and early.better(6.0) != less
    assert early.best == (4.0 if less else 6.0)


def test_patience_counts_measurements_in_a_row():
    kept: list[int] = []
    #         start                     best               1     2          3
    values = [90.0, 10.0, None, 12.0, 12.0, 11.0, 13.0, None, 12.9, 13.0, None, 5.0, 99.0]
    assert ended(monitor(values, kept, patience=3), 0, len(values)) == 11
    assert kept == [1, 3, 6]  # the measurement before the first step has no weights worth keeping


def test_a_gain_below_the_least_is_none_and_does_not_move_the_mark():
    early = StopEarly(StopEarly.Config(least=0.5, patience=3))
    assert [early.better(value) for value in (10.0, 10.4, 10.5, 10.6)] == [True, False, False, True]
    early = StopEarly(StopEarly.Config(metric="eval/nll", least=0.5))
    assert [early.better(value) for value in (2.0, 1.6, 1.4)] == [True, False, True]


def test_what_is_not_a_number_is_never_the_best():
    early = StopEarly(StopEarly.Config(patience=2))
    assert not early.better(math.nan) and early.best is None
    assert early.better(1.0) and not early.better(math.nan) and early.since == 1 and early.best == 1.0


@pytest.mark.parametrize("cut", range(2, 8))
def test_a_resumed_run_ends_at_the_same_step(cut):
    values = [1.0, 10.0, 12.0, 11.0, 12.5, 12.0, 12.4, 12.3, 1.0, 1.0]
    straight: list[int] = []
    assert ended(monitor(values, straight, patience=3), 0, 10) == 7
    kept: list[int] = []
    before = monitor(values, kept, patience=3)
    assert ended(before, 0, cut) is None
    after = monitor(values, kept, patience=3)
    after.load(json.loads(json.dumps(before.state())))
    assert ended(after, cut, 10) == 7 and kept == straight


def test_a_metric_that_is_not_measured_is_named_at_the_start():
    with pytest.raises(InputError, match="no eval/top5 is measured, but eval/top1"):
        monitor([1.0], [], metric="eval/top5").observe(CLOCK.tick(0, 0))


def test_a_run_that_may_not_stop_keeps_nothing():
    watch = Monitor(Monitor.Config(pictures=None), [Scripted([1.0, 0.0, 0.0, 0.0, 0.0])], Tracked(), dict)  # type: ignore[arg-type]
    assert ended(watch, 0, 5) is None and watch.state() == {}


def test_a_recipe_that_measures_at_its_end_alone_cannot_stop_early(tmp_path):
    from finetune.recipe import Finetune
    from penstock.recipe import Source, check

    folder = str(write_set(tmp_path, [3]).root)
    values: dict[str, Any] = {
        "name": "run",
        "duration": "10 steps",
        "batch": 2,
        "data": {"train": folder, "val": folder},
        "augment": {"name": "none", "size": 8},
        "backbone": {"name": "resnet10t", "size": 8},
        "optim": {"lr": 0.1},
        "monitor": {"stop_early": {"metric": "eval/nll"}},
    }
    with pytest.raises(InputError, match=r"measure\.every: stopping early goes by eval/nll"):
        check(Finetune, Source(values=values))
    recipe = check(Finetune, Source(values=values | {"measure": {"every": "2 steps"}}))
    assert recipe.measure.every == Length(2.0, "steps") and not list(accuracy_is_measured_to_stop_early(recipe))


@pytest.mark.parametrize(
    ("metric", "evaluate", "problem"),
    [
        ("eval/tpo1", {}, r"stop_early\.metric: nothing measures eval/tpo1; take one of eval/brier, "),
        ("eval/knn_top1", {}, "nothing measures eval/knn_top1"),
        ("eval/knn_top1", {"knn": SimpleNamespace(every=None)}, r"evaluate\.knn\.every: .* at the start and the end"),
        ("eval/knn_top1", {"knn": SimpleNamespace(every=Length(1.0, "epochs"))}, None),
        ("eval/top1", {}, None),
    ],
)
def test_what_is_never_measured_in_a_run_cannot_stop_it(metric, evaluate, problem):
    recipe = SimpleNamespace(
        monitor=Monitor.Config(stop_early=StopEarly.Config(metric=metric)),
        evaluate_blocks=lambda: evaluate,
        own_metrics=ACCURACY_METRICS,
    )
    found = list(early_stopping_has_measurements(recipe))
    assert not found if problem is None else re.search(problem, found[0])


def test_ranks_are_asked_only_after_a_measurement(monkeypatch):
    asked: list[bool] = []

    def broadcast(value: bool) -> bool:
        asked.append(value)
        return value

    monkeypatch.setattr("penstock.distributed.broadcast", broadcast)
    ended(monitor([1.0, None, 2.0, None, None, 3.0], []), 0, 6)
    assert len(asked) == 3


def decided(rank: int, world: int) -> list[bool]:
    """Measurements differ in the last bits between ranks; all do as rank 0 says."""
    early, said = StopEarly(StopEarly.Config(patience=2)), []
    for value in (50.0, 50.0 + rank * 1e-6, 50.0 + rank * 2e-6, 50.0):
        early.better(value)
        said.append(early.enough)
    return said


def test_ranks_agree(ranks):
    assert ranks(2).run(decided) == [[False, False, True, True]] * 2


def test_more_patience_lets_a_run_that_ended_go_on():
    first = monitor([50.0, 50.0, 50.0], [], patience=1)
    assert ended(first, 0, 3) is not None and first.ended()
    for patience, over in ((1, True), (9, False)):
        resumed = monitor([], [], patience=patience)
        resumed.load(json.loads(json.dumps(first.state())))
        assert resumed.ended() is over
