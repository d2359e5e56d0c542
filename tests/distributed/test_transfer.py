"""What is frozen stays bit-equal and out of the optimizer, what is not moves: under every ZeRO stage, on two ranks."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.transfer import TRANSFERS
from penstock.backbones import Backbone
from penstock.engine import Engine
from penstock.head import Head
from penstock.optim import Optim
from penstock.schedule import Clock
from penstock.streams.batch import Batch
from penstock.task import StepOutput, Task, weighted_mean

STEPS, BATCH, CLASSES = 6, 8, 5
CLOCK = Clock(total=STEPS, batch=BATCH, epoch=BATCH)
OPTIM = Optim.Config(lr=1e-2, weight_decay=0.1)
VIT = {
    "name": "vit_tiny_patch16_224",
    "size": 16,
    "options": {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "drop_path_rate": 0.5},
}
CNN = {"name": "test_resnet", "size": 16}


class Small(Task):
    """A classifier with a transfer, as the stage's task has it."""

    def __init__(self, backbone: Mapping[str, Any], transfer: Any, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = Backbone(Backbone.Config(**backbone))
        self.head = Head(Head.Config(), self.backbone.dim, CLASSES, self.backbone)
        self.transfer, self.time = transfer, 0.0

    def train(self, mode: bool = True) -> "Small":
        super().train(mode)
        self.transfer.set_mode(self, self.time)
        return self

    def forward(self, batch: Batch, knobs: Mapping[str, float]) -> StepOutput:
        logits = self.head(self.backbone(batch.views[0]))
        loss = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        return StepOutput(weighted_mean(loss, batch.weights), batch.weights.sum())


def images(rank: int, step: int, count: int) -> Batch:
    """A batch that differs between ranks and steps."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    pixels = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    positions = torch.arange(count)
    return Batch([pixels], positions % CLASSES, torch.ones(count), positions)


def build(backbone: Mapping[str, Any], kind: str, options: Mapping[str, Any], zero: int, world: int) -> Any:
    transfer_class = TRANSFERS.get(kind)
    transfer = transfer_class(transfer_class.Config(**options))
    task = Small(backbone, transfer)
    transfer.prepare(task, CLOCK)
    optimizer = Optim(OPTIM).build(task, BATCH, transfer.opens(task, CLOCK))
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    frozen = [name for name, param in task.named_parameters() if not param.requires_grad]
    in_optimizer = [name for name, param in task.named_parameters() if id(param) in held]
    engine = Engine(task, optimizer, Engine.Config(zero=zero, precision="fp32"), BATCH // world)
    return engine, frozen, in_optimizer


def train(
    rank: int, world: int, backbone: Mapping[str, Any], kind: str, options: Mapping[str, Any], zero: int, steps: int
) -> dict[str, Any]:
    """Weights before the first step and after each; what is frozen; whose gradient there was."""
    engine, frozen, in_optimizer = build(backbone, kind, options, zero, world)
    task: Any = engine.task
    states, grads = [engine.weights()], set()
    for step in range(steps):
        torch.manual_seed(step)
        task.time = float(step)
        task.train()
        knobs = {"lr": 1e-2, "weight_decay": 0.1}
        engine.set(knobs, task.time)
        batch = images(rank, step, BATCH // world)
        engine.begin(batch.weights.sum())
        engine.backward(engine.forward(batch, knobs))
        grads |= {name for name, param in task.named_parameters() if param.grad is not None}
        engine.step()
        states.append(engine.weights())
    return {"states": states, "frozen": frozen, "in_optimizer": in_optimizer, "grads": grads}


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("backbone,kind", [(CNN, "head"), (VIT, "last_blocks"), (CNN, "last_blocks")])
def test_frozen_weights_and_statistics_stay(ranks, backbone, kind, zero):
    for got in ranks(2).run(train, backbone, kind, {}, zero, 3):
        first, last = got["states"][0], got["states"][-1]
        frozen = set(got["frozen"])
        assert frozen and not frozen & set(got["in_optimizer"]) and not frozen & got["grads"]
        changed = moved(first, last)
        assert not frozen & changed
        trained = set(got["in_optimizer"])
        assert trained - changed == set(), "what trains must move"
        buffers = first.keys() - frozen - trained
        still = {name for name in buffers if any(p.startswith(name.rpartition(".")[0] + ".") for p in frozen)}
        assert bool(still) == (backbone is CNN) and not still & changed
        assert "head.linear.weight" in changed


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gradual_parts_open_at_their_times(ranks, zero):
    options = {"at": ("2 steps", "4 steps")}
    (got, other) = ranks(2).run(train, VIT, "gradual", options, zero, STEPS)
    states = got["states"]
    assert not got["frozen"]
    prefix = "backbone.model."
    low = {n for n in states[0] if n.startswith((f"{prefix}patch_embed", f"{prefix}pos", f"{prefix}cls"))}
    low |= {n for n in states[0] if n.startswith(f"{prefix}blocks.0.")}
    high = {n for n in states[0] if n.startswith((f"{prefix}blocks.1.", f"{prefix}blocks.2.", f"{prefix}norm."))}
    assert low | high == {n for n in states[0] if n.startswith(prefix)}
    for step in range(STEPS):  # the update of step s begins at nominal time s
        changed = moved(states[step], states[step + 1])
        assert {"head.linear.weight", "head.linear.bias"} <= changed
        assert (high <= changed) if step >= 2 else not (high & changed), step
        assert (low <= changed) if step >= 4 else not (low & changed), step
    assert not moved(states[-1], other["states"][-1])


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("norms", [False, True])
def test_lora_moves_adapters_and_head_alone(ranks, zero, norms):
    for got in ranks(2).run(train, VIT, "lora", {"rank": 2, "norms": norms}, zero, 3):
        changed = moved(got["states"][0], got["states"][-1])
        assert changed == set(got["in_optimizer"]) and not changed & set(got["frozen"])
        assert {n for n in changed if n.startswith("head.")} == {"head.linear.weight", "head.linear.bias"}
        others = {n for n in changed if ".lora_" not in n and not n.startswith("head.")}
        assert bool(others) == norms and all(".norm" in n for n in others)
        assert sum(".lora_" in n for n in changed) == 3 * 4 * 2  # blocks, layers in each, A and B


# A head from a probe


def probe(rank: int, world: int) -> tuple[Tensor, Tensor, str]:
    from finetune.head_init import initialise

    torch.manual_seed(0)
    backbone = Backbone(Backbone.Config(**CNN))
    head = Head(Head.Config(init="probe"), backbone.dim, CLASSES, backbone)
    batches = []
    for step in range(4):
        whole = images(0, step, 16)
        share = slice(rank * 16 // world, (rank + 1) * 16 // world)
        positions = whole.positions[share] + 16 * step
        batches.append(Batch([whole.views[0][share]], whole.labels[share], whole.weights[share], positions))
    said = initialise(head, backbone, [str(label) for label in range(CLASSES)], lambda: batches)
    return head.linear.weight.detach(), head.linear.bias.detach(), said


def test_a_probed_head_is_that_of_one_process(ranks):
    weight, bias, said = probe(0, 1)
    assert weight.abs().max() > 0
    for found in ranks(2).run(probe):
        torch.testing.assert_close(found[0], weight, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found[1], bias, rtol=1e-3, atol=1e-3)
        assert found[2] == said
