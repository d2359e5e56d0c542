"""Convolutions run in channels-last layout: the same numbers, on ranks and over a resume."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.backbones import Backbone
from penstock.backbones.batchnorm import convert
from penstock.checkpoint import Checkpoints
from penstock.engine import Engine
from penstock.optim import Optim
from penstock.streams.batch import Batch
from penstock.task import StepOutput, Task, weighted_mean

BATCH, STEPS = 8, 4
SGD = Optim.Config(name="sgd", lr=1e-3, weight_decay=0.1)  # Adam blows the rounding of tiny gradients up
ADAM = Optim.Config(lr=1e-3, weight_decay=0.1)
KNOBS = {"lr": 1e-3, "weight_decay": 0.1}


class Conv(Task):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Backbone(Backbone.Config(name="resnet10t", size=32))
        self.backbone.model = convert(self.backbone.model)

    def forward(self, batch, knobs) -> StepOutput:
        losses = (self.backbone(batch.views[0]).pooled - batch.labels[:, None]).square().mean(1)
        return StepOutput(weighted_mean(losses, batch.weights), batch.weights.sum())


def images(positions: Tensor) -> Batch:
    rows = [torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(int(p))) for p in positions]
    return Batch([torch.stack(rows).to(torch.uint8)], positions % 3, torch.ones(len(positions)), positions)


def plain() -> dict[str, Tensor]:
    """Contiguous, in one process, with torch alone."""
    task = Conv()
    task.backbone.kind = "tokens"  # leaves the layout as it is
    optimizer = Optim(SGD).build(task, BATCH)
    for step in range(STEPS):
        optimizer.zero_grad()
        task(images(torch.arange(step * BATCH, (step + 1) * BATCH)), {}).loss.backward()
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 1e-3, 0.1 * group["decayed"]
        optimizer.step()
    return {name: p.detach().clone() for name, p in task.named_parameters()}


def engine_of(world: int, zero: int, optim: Optim.Config = ADAM) -> Engine:
    task = Conv()
    return Engine(task, Optim(optim).build(task, BATCH), Engine.Config(precision="fp32", zero=zero), BATCH // world)


def train(engine: Engine, rank: int, world: int, first: int, last: int) -> None:
    for step in range(first, last):
        batch = images(torch.arange(step * BATCH + rank, (step + 1) * BATCH, world))
        engine.set(KNOBS)
        engine.begin(batch.weights.sum())
        engine.backward(engine.forward(batch, KNOBS))
        engine.step()


def straight(rank, world, zero, optim):
    engine = engine_of(world, zero, optim)
    train(engine, rank, world, 0, STEPS)
    conv = engine.task.backbone.model.conv1[0].weight
    return engine.weights(), conv.is_contiguous(memory_format=torch.channels_last) and not conv.is_contiguous()


@pytest.mark.parametrize("world,zero", [(1, 0), (2, 0), (2, 1)])
def test_two_ranks_in_channels_last_equal_one_plain_process(ranks, world, zero):
    want = plain()
    for got, turned in ranks(world).run(straight, zero, SGD):
        assert turned == (zero == 0)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def resumed(rank, world, folder):
    first = engine_of(world, 0)
    train(first, rank, world, 0, 2)
    Checkpoints(Checkpoints.Config(), Path(folder)).save(first, 2, {})
    second = engine_of(world, 0)
    Checkpoints(Checkpoints.Config(), Path(folder)).restore(second)
    train(second, rank, world, 2, STEPS)
    return second.weights()


def test_a_resume_is_bitwise(ranks, tmp_path):
    want = ranks(2).run(straight, 0, ADAM)[0][0]
    got = ranks(2).run(resumed, str(tmp_path))[0]
    assert all(torch.equal(got[name], value) for name, value in want.items())
