"""The range test leaves no trace, and finds what its curve shows."""

import math
from itertools import combinations, pairwise
from types import SimpleNamespace

import pytest
import torch

from penstock.engine import Engine
from penstock.errors import InputError
from penstock.lr_finder import RangeTest, draw, find_lr, longest_descent, report
from penstock.optim import Optim
from penstock.schedule import Clock, Curves
from tests.distributed.test_engine import BATCH, train
from tests.toy import Toy, toy_batch


class Stream:
    """Batches of this rank as a pure function of the position, with a slot that does not count."""

    def __init__(self, rank: int, world: int, accumulation: int):
        self.rank, self.world, self.accumulation = rank, world, accumulation

    def batch_at(self, position: int) -> int:
        return BATCH

    def batches(self, since: int, step: int):
        count = BATCH // self.world // self.accumulation
        while True:
            for part in range(self.accumulation):
                start = since + part * count * self.world + self.rank
                yield toy_batch(start + self.world * torch.arange(count), bad=(5,))
            since += BATCH


CURVES = Curves({"lr": 1.0, "weight_decay": 0.1}, Clock(10, BATCH, 100))


class Moving(Toy):
    """With a buffer that each forward moves."""

    def forward(self, batch, knobs):
        self.centre += 0.001
        return super().forward(batch, knobs)


def make(rank: int, world: int, zero: int, precision: str, accumulation: int, **engine) -> Engine:
    task = Moving()
    config = Engine.Config(zero=zero, precision=precision, accumulation=accumulation, **engine)
    optimizer = Optim(Optim.Config(lr=1e-2, betas=(0.9, 0.95))).build(task, BATCH)
    return Engine(task, optimizer, config, BATCH // world // accumulation)


def everything(engine: Engine) -> dict[str, torch.Tensor]:
    masters, found = engine.masters(), engine.weights()
    for name, param in engine.task.named_parameters():
        for key, value in masters.state(param).items():
            found[f"{key} of {name}"] = torch.as_tensor(value).clone()
    return found


def trained(rank, world, zero, precision, find_at, engine):
    made = make(rank, world, zero, precision, 2, **engine)
    tests, drawn = [], None
    for step in range(4):
        if step in find_at:
            torch.manual_seed(step)
            before, state = torch.get_rng_state(), everything(made)
            tests.append(find_lr(made, Stream(rank, world, 2), CURVES, seed=1, low=1e-3, high=1.0, steps=12))
            after = everything(made)
            assert after.keys() == state.keys() and all(
                torch.equal(after[name], value) for name, value in state.items()
            )
            drawn = torch.equal(before, torch.get_rng_state())
        train(made, rank, world, step, step + 1)
    return everything(made), tests, drawn


@pytest.mark.parametrize(
    "zero,precision,engine",
    [(0, "fp32", {}), (0, "fp32", {"sam": {"rho": 0.1}}), (2, "fp32", {}), (2, "bf16_pure", {}), (3, "fp32", {})],
)
def test_training_after_it_is_training_without_it(ranks, zero, precision, engine):
    want = ranks(2).run(trained, zero, precision, (), engine)
    got = ranks(2).run(trained, zero, precision, (0, 2), engine)
    for (plain, _, _), (weights, tests, drawn) in zip(want, got, strict=True):
        assert drawn and plain.keys() == weights.keys()
        assert all(torch.equal(plain[name], value) for name, value in weights.items())
        assert len(tests[0].losses) > 10 and min(tests[0].losses) < 0.9 * tests[0].losses[0]  # it did train
    assert got[0][1] == got[1][1]  # all ranks know the same losses


def first_loss(rank, world):
    engine = make(rank, world, 0, "fp32", 1)
    return find_lr(engine, Stream(rank, world, 1), CURVES, seed=1, low=1e-9, high=1e-8, steps=10).losses[0]


def test_its_losses_are_means_over_the_valid_samples_of_all_ranks(ranks):
    want = Toy()(toy_batch(torch.arange(BATCH), bad=(5,)), {}).loss.item()
    assert ranks(2).run(first_loss) == pytest.approx([want] * 2, rel=0.01)  # the buffer moves by 0.001


def exploding(rank, world):
    engine = make(rank, world, 0, "fp32", 1)
    try:
        find_lr(engine, Stream(rank, world, 1), CURVES, seed=1, low=1e6, high=1e30, steps=30)
    except InputError as error:
        return str(error)


def test_a_loss_that_explodes_at_once_is_said_so(ranks):
    assert all("start lower" in text for text in ranks(2).run(exploding))


# Suggestions ---------------------------------------------------------------------------------------------------------


def made_up(steps: int = 100) -> RangeTest:
    """Flat, then down a cliff around 1e-2, then up."""
    rates = [1e-7 * 1e8 ** (i / (steps - 1)) for i in range(steps)]
    smooth = [2.0 - 1.5 / (1 + math.exp(-4 * (math.log10(rate) + 2))) + 20 * rate**2 for rate in rates]
    return RangeTest(rates, smooth, smooth, True)


def test_suggestions_lie_where_the_loss_falls():
    test = made_up()
    assert test.steep == pytest.approx(1e-2, rel=0.3)
    assert 1e-5 < test.valley < 2e-2
    assert f"{test.valley:.1e}" in str(test) and "diverges at 1.0e+01" in str(test)


def test_the_valley_is_fastais():
    """Its rule written out: of the last `length` points of the longest falling sequence, a third and a sixth down."""
    test = made_up()
    losses, rates = test.smooth[10:-5], test.rates[10:-5]
    lengths, end, start = [1] * len(losses), 0, 0
    for i in range(1, len(losses)):
        for j in range(i):
            if losses[i] < losses[j] and lengths[i] < lengths[j] + 1:
                lengths[i] = lengths[j] + 1
            if lengths[end] < lengths[i]:
                end, start = i, i - lengths[i]
    third = (end - start) / 3
    assert test.valley == rates[start + int(third) + int(third / 2)]


def test_the_longest_descent_by_trying_all():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        losses = torch.randint(0, 9, (9,), generator=generator).tolist()
        falling = (
            size
            for size in range(1, 10)
            for chosen in combinations(losses, size)
            if all(a > b for a, b in pairwise(chosen))
        )
        assert longest_descent(losses)[1] == max(falling)


def test_a_loss_that_only_rises_gives_no_suggestion():
    test = RangeTest([10.0**i for i in range(20)], [float(i) for i in range(20)], [float(i) for i in range(20)], False)
    assert test.valley is None and test.steep is None and "no learning rate" in str(test)


def test_the_report(tmp_path, capsys):
    kept = {}
    tracker = SimpleNamespace(
        picture=lambda step, name, image: kept.update({name: image}), event=lambda name, step, **data: kept.update(data)
    )
    report(made_up(), tmp_path / "run", tracker)
    assert (tmp_path / "run" / "lr_finder.png").stat().st_size > 5000
    assert "suggested peak rate" in capsys.readouterr().out
    assert kept["valley"] == made_up().valley and kept["lr_finder"].dtype == torch.uint8
    assert torch.equal(kept["lr_finder"], draw(made_up()))
