"""The engine against a plain loop in one process: every ZeRO stage and precision, ranks with different data."""

import pytest
import torch

from penstock.engine import Engine, settings
from penstock.optim import Optim, parameter_groups
from tests.toy import Toy, toy_batch

BATCH, STEPS = 8, 4
OPTIM = Optim.Config(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
KNOBS = [{"lr": 1e-2 * (1 - s / 8), "weight_decay": 0.1 + 0.01 * s} for s in range(STEPS)]


def plain_weights(bad: tuple[int, ...] = (), clip: float | None = None) -> dict[str, torch.Tensor]:
    """The same steps with torch alone: one process, the whole batch."""
    task = Toy()
    groups = [{"params": g.params, "decayed": g.decayed} for g in parameter_groups(task)]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    for step, knobs in enumerate(KNOBS):
        batch = toy_batch(torch.arange(step * BATCH, (step + 1) * BATCH), bad)
        optimizer.zero_grad()
        task(batch, knobs).loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(task.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = knobs["lr"], knobs["weight_decay"] * group["decayed"]
        optimizer.step()
    return {name: p.detach().clone() for name, p in task.named_parameters()}


def train(engine: Engine, rank: int, world: int, first: int, last: int, bad=(), poison_at=None, order=None) -> list:
    accumulation, done = engine.accumulation, []
    micro = BATCH // world // accumulation
    for step in range(first, last):
        start = step * BATCH + rank * micro * accumulation
        batches = [
            toy_batch(torch.arange(start + i * micro, start + (i + 1) * micro), bad) for i in range(accumulation)
        ]
        knobs = KNOBS[step] | ({"poison": 1.0} if step == poison_at else {})
        engine.set(knobs)
        engine.begin(torch.stack([b.weights.sum() for b in batches]).sum())
        for batch in batches:
            engine.backward(engine.forward(batch, knobs))
        done.append(engine.step())
    return done


def build(zero: int, precision: str, accumulation: int, world: int, seed: int = 0, **extra) -> Engine:
    task = Toy(seed)
    config = Engine.Config(zero=zero, precision=precision, accumulation=accumulation, **extra)
    return Engine(task, Optim(OPTIM).build(task, BATCH), config, BATCH // world // accumulation)


def run_steps(rank, world, zero, precision, accumulation, bad, extra):
    engine = build(zero, precision, accumulation, world, seed=rank, **extra)  # ranks differ: rank 0's weights must win
    train(engine, rank, world, 0, STEPS, bad)
    return engine.weights()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_fp32_equals_plain_loop(ranks, zero, accumulation):
    bad = (1, 9, 10, 11)  # ranks and micro-batches with unequal numbers of valid samples
    want = plain_weights(bad)
    for got in ranks(2).run(run_steps, zero, "fp32", accumulation, bad, {}):
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, atol=2e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_clipping_equals_plain_loop(ranks, zero):
    want = plain_weights(clip=0.05)
    for got in ranks(2).run(run_steps, zero, "fp32", 2, (), {"clip": 0.05}):
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "zero,precision", [(0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (1, "bf16_pure"), (2, "bf16_pure")]
)
def test_bf16_stays_near_fp32(ranks, zero, precision):
    want = plain_weights()
    for got in ranks(2).run(run_steps, zero, precision, 1, (), {}):
        for name, value in want.items():
            assert got[name].dtype == torch.float32
            torch.testing.assert_close(got[name], value, atol=0.03, rtol=0)


def poisoned(rank, world, zero):
    engine = build(zero, "fp32", 2, world)
    train(engine, rank, world, 0, 2)
    before = engine.weights()
    # The label 3 falls on position 18 (rank 0) and 23 (rank 1); only the micro-batch that holds it is NaN.
    skipped = train(engine, rank, world, 2, 3, poison_at=2)
    same = all(torch.equal(before[name], value) for name, value in engine.weights().items())
    applied = train(engine, rank, world, 3, 4)
    finite = all(torch.isfinite(value).all() for value in engine.weights().values())
    return skipped[0].applied, same, applied[0].applied, bool(finite)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_loss_that_is_not_finite_on_one_rank_moves_no_weight(ranks, zero):
    assert ranks(2).run(poisoned, zero) == [(False, True, True, True)] * 2


def buffers(rank, world):
    task = Toy()
    task.centre += rank
    engine = Engine(task, Optim(OPTIM).build(task, BATCH), Engine.Config(precision="fp32"), 4)
    return engine.weights()["centre"].sum().item()


def test_buffers_are_broadcast(ranks):
    assert ranks(2).run(buffers) == [0.0, 0.0]


def two_backwards(rank, world):
    engine = build(1, "fp32", 1, world)
    batch = toy_batch(torch.arange(4))
    engine.begin(batch.weights.sum())
    engine.backward(engine.forward(batch, KNOBS[0]))
    engine.backward(engine.forward(batch, KNOBS[0]))
    try:
        engine.step()
    except RuntimeError as error:
        return str(error)


def test_a_second_backward_in_a_step_is_refused(ranks):
    assert all("2 backwards in a step of 1" in message for message in ranks(2).run(two_backwards))


def test_dictionary_is_generated():
    made = settings(
        Engine.Config(zero=2, clip=1.0, accumulation=4, deepspeed={"zero_optimization": {"overlap_comm": True}}), 8
    )
    assert made["zero_optimization"] == {"stage": 2, "memory_efficient_linear": False, "overlap_comm": True}
    assert made["gradient_accumulation_steps"] == 4 and made["gradient_clipping"] == 1.0
    assert "scheduler" not in made and "optimizer" not in made


@pytest.mark.parametrize(
    "extra,words",
    [
        ({"gradient_cliping": 1.0}, "gradient_clipping"),
        ({"scheduler": {}}, "set optim.schedule"),
        ({"zero_optimization": {"stage": 3}}, "set engine.zero"),
        ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_comm"),
    ],
)
def test_wrong_settings_are_refused_with_the_reason(extra, words):
    with pytest.raises(ValueError, match=words):
        Engine.Config(deepspeed=extra)


def test_allowed_settings_exist_in_the_installed_deepspeed():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from penstock.engine_settings import ALLOWED

    fields = DeepSpeedZeroConfig.model_fields
    assert ALLOWED["zero_optimization"] <= {name for key, info in fields.items() for name in (key, info.alias)}


@pytest.mark.parametrize("precision", ["bf16_pure", "fp16"])
def test_unsound_combinations_are_refused(precision):
    with pytest.raises(ValueError, match="use zero: 1"):
        Engine.Config(zero=0, precision=precision)


@pytest.mark.parametrize("zero", [1, 2])
def test_bf16_gradients_are_averaged_in_fp32(ranks, zero):
    """DeepSpeed's autocast would reduce the gradients of linear layers in bf16 from stage 1 on."""
    want = ranks(2).run(run_steps, 0, "bf16", 2, (), {})[0]
    for name, value in ranks(2).run(run_steps, zero, "bf16", 2, (), {})[0].items():
        torch.testing.assert_close(value, want[name], atol=1e-6, rtol=0)
