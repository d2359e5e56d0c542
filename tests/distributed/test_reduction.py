"""Stage 0 reduces gradients by itself: in buckets, not at all in one process, and as the other stages would."""

import pytest
import torch

import penstock.engine
from penstock.engine import Engine
from penstock.optim import Optim
from tests.distributed.test_engine import BATCH, KNOBS, OPTIM, STEPS, build, plain_weights, train
from tests.toy import Toy


def with_small_buckets(rank, world, elements):
    kept, penstock.engine.BUCKET = penstock.engine.BUCKET, elements
    try:
        engine = build(0, "fp32", 1, world, seed=rank)
        train(engine, rank, world, 0, STEPS)
    finally:
        penstock.engine.BUCKET = kept
    return engine.weights()


def with_an_unused_weight(rank, world):
    task = Toy()
    task.idle = torch.nn.Linear(2, 2)
    with torch.no_grad():
        task.idle.weight.fill_(1.0)
    engine = Engine(task, Optim(OPTIM).build(task, BATCH), Engine.Config(precision="fp32"), BATCH // world)
    train(engine, rank, world, 0, STEPS)
    return engine.weights("idle.weight")["idle.weight"]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("elements", [1, 100])
def test_buckets_of_any_size_give_the_plain_loop(ranks, world, elements):
    want = plain_weights()
    for got in ranks(world).run(with_small_buckets, elements):
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, atol=2e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("world", [1, 2])
def test_a_weight_the_loss_does_not_use_decays_whatever_the_ranks(ranks, world):
    want = 1.0
    for knobs in KNOBS:
        want *= 1 - knobs["lr"] * knobs["weight_decay"]
    for got in ranks(world).run(with_an_unused_weight):
        torch.testing.assert_close(got, torch.full((2, 2), want))
