"""Averaged weights at every ZeRO stage against fp64, over restarts, and where half precision would stand still."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from penstock.checkpoint import Checkpoints
from penstock.ema import Average
from penstock.engine import Engine
from penstock.errors import InputError
from penstock.optim import Optim
from penstock.schedule import Clock, Tick
from tests.distributed.test_checkpoint import store
from tests.toy import Toy, toy_batch

BATCH = 8
CLOCK = Clock(total=500, batch=BATCH, epoch=100)


def tick(step: int, clock: Clock = CLOCK) -> Tick:
    return clock.tick(step, step * clock.batch, (step - 1) * clock.batch)


class Counting(Toy):
    """With a buffer of floats and one of integers that move."""

    def __init__(self, seed: int = 0):
        super().__init__(seed)
        self.register_buffer("running", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, batch, knobs):
        self.running.lerp_(batch.views[0].float().mean() / 255 * torch.arange(3.0), 0.1)
        self.count += 1
        return super().forward(batch, knobs)


def build(world: int, zero: int, precision: str, seed: int = 0, **average) -> tuple[Engine, Average]:
    task = Counting(seed)
    averaged = Average(Average.Config(**{"name": "ema", "decay": 0.98} | average), task)
    optimizer = Optim(Optim.Config(lr=1e-2)).build(task, BATCH)
    return Engine(task, optimizer, Engine.Config(zero=zero, precision=precision), BATCH // world), averaged


def steps(engine: Engine, average: Average, rank: int, world: int, first: int, last: int, after=None) -> None:
    micro = BATCH // world
    for step in range(first, last):
        start = step % 7 * BATCH + rank * micro
        batch = toy_batch(torch.arange(start, start + micro))
        engine.set({"lr": 1e-2, "weight_decay": 0.0})
        engine.begin(batch.weights.sum())
        engine.backward(engine.forward(batch, {}))
        assert engine.step().applied
        average.update(engine, tick(step + 1))
        if after:
            after(step + 1)


def against_fp64(rank, world, zero, precision, count):
    engine, average = build(world, zero, precision, warmup=False)
    begin = {name: value.double() for name, value in average.weights().items()}
    want, moved = dict(begin), []

    def after(step):
        for name, value in engine.weights().items():
            want[name] = 0.98 * want[name] + 0.02 * value.double() if value.is_floating_point() else value
        if step == 10:
            got = average.weights()
            moved.append(min((got[n] - begin[n].float()).abs().max().item() for n in begin if n.startswith("back")))

    steps(engine, average, rank, world, 0, count, after)
    got = average.weights()
    gaps = {name: (got[name].double() - value).abs().max().item() for name, value in want.items() if name != "count"}
    whole = all(value.dtype == torch.float32 for name, value in got.items() if name != "count")
    return gaps, moved[0], whole and not average.module.training, got["count"].item()


@pytest.mark.parametrize(
    "zero,precision,count",
    [(0, "fp32", 500), (0, "bf16", 30), (1, "fp32", 30), (2, "bf16_pure", 30), (3, "fp32", 30)],
)
def test_it_is_the_average_in_fp64(ranks, zero, precision, count):
    for gaps, moved, sound, counted in ranks(2).run(against_fp64, zero, precision, count):
        assert max(gaps.values()) < (1e-5 if count == 500 else 1e-6), gaps
        assert moved > 1e-4 and sound and counted == count


# A fixed target, without an engine --------------------------------------------------------------------------


class Fixed(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.weight = nn.Parameter(torch.full((64,), value))
        self.register_buffer("count", torch.tensor(int(value)))


def towards(values, **config) -> tuple[Average, list[float]]:
    """The average's weight after each update with weights `values`."""
    task = Fixed(0.0)
    average, found = Average(Average.Config(**config), task), []
    for step, value in enumerate(values, start=1):
        task.weight.data.fill_(value)
        task.count.fill_(step)
        engine = SimpleNamespace(
            task=task, device=torch.device("cpu"), trained=lambda: [(n, p.detach()) for n, p in task.named_parameters()]
        )
        average.update(engine, tick(step, Clock(len(values), 1, 100)))
        found.append(average.module.weight[0].item())
    return average, found


def test_a_long_average_moves_as_far_as_it_should():
    _, found = towards([1.0] * 5000, name="ema", decay=0.9999, warmup=False)
    assert found[-1] == pytest.approx(1 - 0.9999**5000, abs=5e-4)


def test_the_decay_warms_up():
    _, found = towards([1.0, 1.0, 1.0], name="ema", decay=0.15)
    kept = 0.1 * 0.15 * 0.15  # min(0.15, 1/10), min(0.15, 2/11), ...
    assert found[-1] == pytest.approx(1 - kept, abs=1e-6)


def test_equal_weights_from_a_time_on():
    values = [5.0, 1.0, 2.0, 3.0, 4.0, 9.0, 6.0, 8.0]
    average, found = towards(values, name="swa", start="50%", every=2)
    # Time 4 and 6 and 8: the weights after steps 4, 6 and 8.
    assert found[:3] == [0.0] * 3 and found[-1] == pytest.approx((3 + 9 + 8) / 3)
    assert average.updates == 3 and average.module.count == 8


def test_an_average_that_starts_later_begins_there():
    _, found = towards([5.0, 1.0, 2.0, 3.0], name="ema", start="50%", decay=0.5, warmup=False)
    assert found == [0.0, 1.0, 1.5, 2.25]


def test_every_counts_steps_and_decay_is_per_update():
    _, found = towards([1.0] * 6, name="ema", every=3, decay=0.5, warmup=False)
    assert found == [0.0, 0.0, 0.5, 0.5, 0.5, 0.75]


def test_an_average_that_would_never_begin_is_refused():
    with pytest.raises(ValueError, match="run's end"):
        Average.Config(name="swa", start=1.0)


# Restarts ---------------------------------------------------------------------------------------------------


def in_one_go(rank, world, zero, precision):
    engine, average = build(world, zero, precision)
    steps(engine, average, rank, world, 0, 6)
    return average.weights(), average.updates


def first_half(rank, world, folder, zero, precision):
    engine, average = build(world, zero, precision)
    steps(engine, average, rank, world, 0, 3)
    assert store(folder).save(engine, 3, {}, average=average) is None


def second_half(rank, world, folder, zero, precision):
    engine, average = build(world, zero, precision, seed=5)
    store(folder, resume="must").restore(engine, average=average)
    steps(engine, average, rank, world, 3, 6)
    return average.weights(), average.updates


@pytest.mark.parametrize(
    "zero,precision,then,exact",
    [
        (0, "fp32", 2, True),
        (2, "fp32", 2, True),
        (2, "bf16_pure", 2, True),
        (3, "fp32", 2, True),
        (1, "fp32", 1, False),
    ],
)
def test_a_resumed_average_goes_on_bit_by_bit(ranks, tmp_path, zero, precision, then, exact):
    want, updates = ranks(2).run(in_one_go, zero, precision)[0]
    ranks(2).run(first_half, str(tmp_path), zero, precision)
    for got, count in ranks(then).run(second_half, str(tmp_path), zero, precision):
        assert count == updates == 6
        for name, value in want.items():
            if exact and not name.startswith("running"):  # a buffer of each rank's own
                assert torch.equal(got[name], value), name
            elif not name.startswith("running"):
                torch.testing.assert_close(got[name], value, atol=1e-6, rtol=0)


def without_an_average(rank, world, folder):
    engine, average = build(world, 0, "fp32")
    store(folder).save(engine, 1, {})
    try:
        Checkpoints(Checkpoints.Config(), store(folder).folder.parent).restore(engine, average=average)
    except InputError as error:
        return str(error)


def test_a_checkpoint_without_an_average_is_refused(ranks, tmp_path):
    assert all("average.name=none" in text for text in ranks(2).run(without_an_average, str(tmp_path)))
