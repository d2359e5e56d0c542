"""Steps that do more than descend: clipping, SAM, groups that open later, the pull to the start. Each against torch
alone in one process, on ranks with different data."""

from itertools import pairwise

import pytest
import timm.utils
import torch

from penstock.engine import Engine
from penstock.optim import Optim, parameter_groups
from penstock.sam import Sam
from tests.distributed.test_engine import BATCH, KNOBS, STEPS, train
from tests.toy import Toy, toy_batch

SGD = {"name": "momentum", "lr": 1e-2, "momentum": 0.0}  # shows a gradient as it is; Adam hides its size


def make(world: int, optim: dict, seed: int = 0, task=None, accumulation: int = 1, opens=None, **engine) -> Engine:
    task = task or Toy(seed)
    config = Engine.Config(**{"precision": "fp32", "accumulation": accumulation} | engine)
    optimizer = Optim(Optim.Config(**{"lr": 1e-2} | optim)).build(task, BATCH, opens)
    return Engine(task, optimizer, config, BATCH // world // accumulation)


def plain(change, knobs=KNOBS, task=None) -> dict[str, torch.Tensor]:
    """Weights after w -= lr * change(task, batch, step), by name, in one process."""
    task = task or Toy()
    for step, values in enumerate(knobs):
        batch = toy_batch(torch.arange(step * BATCH, (step + 1) * BATCH))
        gradients = change(task, batch, step)
        with torch.no_grad():
            for param, gradient in zip(task.parameters(), gradients, strict=True):
                param -= values["lr"] * gradient
    return {name: p.detach().clone() for name, p in task.named_parameters()}


def gradients(task, batch) -> list[torch.Tensor]:
    return list(torch.autograd.grad(task(batch, {}).loss, list(task.parameters())))


def close(got: dict, want: dict, atol: float = 2e-6) -> None:
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


# Clipping ----------------------------------------------------------------------------------------------------------


def clipped(rank, world, accumulation, how, clip):
    engine = make(world, SGD | {"weight_decay": 0.0}, rank, accumulation=accumulation, clip=clip, clip_by=how)
    norms = [step.grad_norm for step in knobbed(engine, rank, world)]
    return engine.weights(), norms


def knobbed(engine, rank, world, knobs=None):
    """`train` with knobs that do not decay."""
    import tests.distributed.test_engine as module

    kept, module.KNOBS = module.KNOBS, knobs or [values | {"weight_decay": 0.0} for values in KNOBS]
    try:
        return train(engine, rank, world, 0, len(module.KNOBS))
    finally:
        module.KNOBS = kept


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("how,clip", [("value", 0.01), ("agc", 0.02)])
def test_clipping_is_timms_on_the_whole_gradient(ranks, accumulation, how, clip):
    norms, moved = [], []

    def change(task, batch, step):
        task.zero_grad()
        task(batch, {}).loss.backward()
        before = [param.grad.clone() for param in task.parameters()]
        norms.append(torch.stack([gradient.norm() for gradient in before]).norm().item())
        clipped = task.parameters() if how == "value" else task.backbone.parameters()
        timm.utils.dispatch_clip_grad(list(clipped), clip, mode=how)
        after = [param.grad.clone() for param in task.parameters()]
        moved.append([not torch.equal(a, b) for a, b in zip(before, after, strict=True)])
        if how == "agc":
            heads = [not name.startswith("backbone.") for name, _ in task.named_parameters()]
            assert not any(changed for changed, head in zip(moved[-1], heads, strict=True) if head)
        return after

    want = plain(change)
    assert all(any(changed) and not all(changed) for changed in moved) or how == "value"
    for got, reported in ranks(2).run(clipped, accumulation, how, clip):
        close(got, want)
        assert reported == pytest.approx(norms, rel=1e-4)  # of the gradient before it was clipped


@pytest.mark.parametrize(
    "options,says",
    [
        ({"clip": 0.1, "clip_by": "agc", "zero": 1}, "clip_by.*use zero: 0, or clip_by: norm"),
        ({"clip": 0.1, "clip_by": "value", "zero": 3}, "clip_by"),
        ({"clip_by": "value"}, "needs a threshold"),
        ({"sam": {}, "zero": 1}, "sam.*use zero: 0, or sam: null"),
        ({"sam": {}, "zero": 1, "precision": "fp16"}, "sam"),
        ({"sam": {"rho": 0}}, "greater than 0"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(options, says):
    with pytest.raises(ValueError, match=says):
        Engine.Config(**options)


# SAM ---------------------------------------------------------------------------------------------------------------


class Dropping(Toy):
    """With dropout and running statistics, and a note of the weights each forward saw."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.weights, self.draws = [], []

    def forward(self, batch, knobs):
        self.seen += len(batch)
        self.weights.append(self.decoder.weight.detach().clone())
        self.draws.append(torch.rand(3))
        return super().forward(batch, knobs)


def two_sweeps(rank, world, accumulation, sam, poison_at=None):
    engine = make(world, SGD | {"weight_decay": 0.0}, rank, Dropping(rank), accumulation, sam=sam)
    micro, done, metered = BATCH // world // accumulation, [], 0
    for step in range(STEPS):
        start = step * BATCH + rank * micro * accumulation
        parts = [toy_batch(torch.arange(start + i * micro, start + (i + 1) * micro)) for i in range(accumulation)]
        knobs = KNOBS[step] | {"weight_decay": 0.0} | ({"poison": 1.0} if step == poison_at else {})
        engine.set(knobs)
        engine.begin(torch.stack([part.weights.sum() for part in parts]).sum())
        for sweep in engine.sweeps(step):
            torch.manual_seed(step)
            for part in parts:
                engine.backward(engine.forward(part, knobs))
                metered += sweep == 0
        done.append(engine.step().applied)
    task = engine.task
    same = [torch.equal(a, b) for a, b in zip(task.draws[::2], task.draws[1::2], strict=False)]
    return engine.weights(), done, metered, int(task.seen), len(task.weights), same


def sam_change(sam: Sam.Config):
    def change(task, batch, step):
        first = gradients(task, batch)
        if (step + 1) % sam.every:
            return first
        scales = [param.detach().abs() if sam.adaptive else torch.ones_like(param) for param in task.parameters()]
        norm = torch.stack([(s * g).norm() for s, g in zip(scales, first, strict=True)]).norm()
        before = [param.detach().clone() for param in task.parameters()]
        with torch.no_grad():
            for param, scale, gradient in zip(task.parameters(), scales, first, strict=True):
                param += sam.rho * scale.square() * gradient / norm
        second = gradients(task, batch)
        with torch.no_grad():
            for param, value in zip(task.parameters(), before, strict=True):
                param.copy_(value)
        return second

    return change


@pytest.mark.parametrize("world,accumulation", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("options", [{"rho": 0.5}, {"rho": 0.5, "every": 3}, {"rho": 2.0, "adaptive": True}])
def test_sam_is_the_papers_on_any_number_of_ranks(ranks, world, accumulation, options):
    want, without = plain(sam_change(Sam.Config(**options))), plain(lambda task, batch, step: gradients(task, batch))
    assert max((want[name] - without[name]).abs().max() for name in want) > 1e-5
    twice = 1 if options.get("every") == 3 else STEPS
    for got, done, metered, seen, forwards, same in ranks(world).run(two_sweeps, accumulation, options):
        close(got, want)
        assert all(done) and metered == STEPS * accumulation and forwards == (STEPS + twice) * accumulation
        assert seen == STEPS * BATCH // world  # a buffer counts each sample once
        assert all(same) or accumulation > 1 or twice == 1


def one_climb(rank, world):
    """The weights that the second sweep saw, and those after it, for one step."""
    engine = make(world, SGD, 0, Dropping(), sam={"rho": 0.3})
    before = engine.weights()
    batch = toy_batch(torch.arange(rank * 4, rank * 4 + 4))
    engine.set(KNOBS[0])
    engine.begin(batch.weights.sum())
    seen = {}
    for sweep in engine.sweeps(0):
        seen[sweep] = engine.weights()
        engine.backward(engine.forward(batch, {}))
    restored = all(torch.equal(before[name], value) for name, value in engine.weights().items() if name != "seen")
    slopes = {name: param.grad.clone() for name, param in engine.task.named_parameters()}
    return before, seen[1], restored, slopes


def test_the_second_gradient_is_at_the_climbed_weights_by_finite_differences(ranks):
    """At w + rho g / |g|, with g itself made of difference quotients."""
    task, batch = Toy(), toy_batch(torch.arange(8))
    params = dict(task.named_parameters())

    def slope(values: dict[str, torch.Tensor], name: str, index: int, step: float = 2e-3) -> float:
        ends = []
        for sign in (1, -1):
            for each, param in params.items():
                param.data.copy_(values[each])
            params[name].data.view(-1)[index] += sign * step
            ends.append(task(batch, {}).loss.item())
        return (ends[0] - ends[1]) / (2 * step)

    results = ranks(2).run(one_climb)
    start = {name: value for name, value in results[0][0].items() if name in params}
    slopes = {name: [slope(start, name, i) for i in range(value.numel())] for name, value in start.items()}
    norm = sum(each**2 for values in slopes.values() for each in values) ** 0.5
    climbed = {n: v + 0.3 * torch.tensor(slopes[n]).view_as(v) / norm for n, v in start.items()}
    for _, seen, restored, _ in results:
        assert restored
        close(seen, climbed, atol=1e-4)
    differ = []
    for name in ("decoder.weight", "token", "backbone.model.0.weight"):
        mean = (results[0][3][name] + results[1][3][name]) / 2  # not yet reduced
        for index in (0, 3, 7):
            got, want = mean.view(-1)[index].item(), slope(climbed, name, index)
            assert got == pytest.approx(want, abs=1e-4)
            differ.append(abs(slopes[name][index] - want))
    assert max(differ) > 3e-3  # at the weights themselves it would be another gradient


def test_sam_skips_what_is_not_finite_on_one_rank(ranks):
    for got, done, *_ in ranks(2).run(two_sweeps, 2, {"rho": 0.5}, 2):
        assert done == [True, True, False, True]
        assert all(torch.isfinite(value).all() for value in got.values())


# Groups that open later --------------------------------------------------------------------------------------------


def opening(rank, world, zero, precision):
    names = [name for name, _ in Toy().backbone.named_parameters()]
    opens = {f"backbone.{name}": 2.0 for name in names}
    engine = make(world, {"weight_decay": 0.1, "l2_sp": 0.1}, opens=opens, zero=zero, precision=precision)
    history = [engine.weights()]
    for step in range(STEPS):
        batch = toy_batch(torch.arange(step * BATCH + rank * 4, step * BATCH + rank * 4 + 4))
        engine.set(KNOBS[step] | {"l2_sp": 0.1}, now=float(step))
        engine.begin(batch.weights.sum())
        engine.backward(engine.forward(batch, {}))
        assert engine.step().applied
        history.append(engine.weights())
    return history


@pytest.mark.parametrize("zero,precision", [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16_pure")])
def test_closed_groups_stay_bit_by_bit_and_then_move(ranks, zero, precision):
    for history in ranks(2).run(opening, zero, precision):
        for name in history[0].keys() - {"centre"}:
            still = [torch.equal(a[name], b[name]) for a, b in pairwise(history)]
            assert still == ([True, True, False, False] if name.startswith("backbone.") else [False] * 4), name


def norm_of_a_step(rank, world):
    opens = {name: 10.0 for name, _ in Toy().named_parameters() if name.startswith("backbone")}
    engine = make(world, SGD, rank, opens=opens, clip=1e-3)
    batch = toy_batch(torch.arange(rank, BATCH, world))
    engine.set(KNOBS[0], 0.0)
    engine.begin(batch.weights.sum())
    engine.backward(engine.forward(batch, KNOBS[0]))
    return engine.step().grad_norm


def test_what_has_not_opened_takes_no_part_in_the_norm_that_is_clipped(ranks):
    task = Toy()
    named = zip(task.named_parameters(), gradients(task, toy_batch(torch.arange(BATCH))), strict=True)
    squares = [g.square().sum() for (name, _), g in named if not name.startswith("backbone")]
    for norm in ranks(2).run(norm_of_a_step):
        assert norm == pytest.approx(float(sum(squares).sqrt()), rel=1e-5)


def test_a_name_that_is_not_trained_cannot_open():
    with pytest.raises(ValueError, match="nowhere"):
        parameter_groups(Toy(), opens={"backbone.nowhere": 3.0})


# Towards the start -------------------------------------------------------------------------------------------------


def pulled(rank, world, zero, precision, optim, knobs, steps):
    engine = make(world, optim, seed=rank, zero=zero, precision=precision)
    knobbed(engine, rank, world, knobs[:steps])
    return engine.weights()


PULL = [values | {"l2_sp": 3.0} for values in KNOBS]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_l2_sp_is_its_formula(ranks, zero):
    """AdamW on both parts: the backbone decays towards its start, the rest towards 0."""
    task = Toy()
    start = {name: param.detach().clone() for name, param in task.named_parameters()}
    optimizer = torch.optim.AdamW(task.parameters(), lr=1.0, weight_decay=0.0)
    decayed = {n for g in parameter_groups(task) if g.decayed for n in g.names}
    for step, knobs in enumerate(PULL):
        optimizer.zero_grad()
        task(toy_batch(torch.arange(step * BATCH, (step + 1) * BATCH)), {}).loss.backward()
        with torch.no_grad():
            for name, param in task.named_parameters():
                if name.startswith("backbone."):
                    param -= knobs["lr"] * knobs["l2_sp"] * (param - start[name])
                elif name in decayed:
                    param -= knobs["lr"] * knobs["weight_decay"] * param
        optimizer.param_groups[0]["lr"] = knobs["lr"]
        optimizer.step()
    want = {name: param.detach().clone() for name, param in task.named_parameters()}
    for got in ranks(2).run(pulled, zero, "fp32", {"l2_sp": 1.0}, PULL, STEPS):
        close(got, want)


def resting(rank, world, zero, folder):
    """Weights moved away from their start by SGD, saved, resumed, and then left to the pull alone."""
    from tests.distributed.test_checkpoint import store

    engine = make(world, SGD | {"l2_sp": 1.0}, zero=zero)
    start = engine.weights()
    knobbed(engine, rank, world, [{"lr": 1.0, "weight_decay": 0.0, "l2_sp": 0.0}] * 2)
    away = engine.weights()
    assert store(folder).save(engine, 2, {}) is None
    engine = make(world, SGD | {"l2_sp": 1.0}, zero=zero)
    store(folder, resume="must").restore(engine)
    assert all(torch.equal(away[name], value) for name, value in engine.weights().items())
    batch = toy_batch(torch.arange(4))
    for _ in range(40):
        engine.set({"lr": 0.5, "weight_decay": 0.0, "l2_sp": 1.0})
        engine.begin(batch.weights.sum())
        output = engine.forward(batch, {})
        engine.backward(type(output)(output.loss * 0, output.weight))
        engine.step()
    return start, away, engine.weights()


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_without_a_gradient_the_backbone_comes_back_to_its_start_after_a_resume(ranks, tmp_path, zero):
    for start, away, back in ranks(2).run(resting, zero, str(tmp_path)):
        for name in away:
            if name.startswith("backbone."):
                assert not torch.equal(start[name], away[name])
                torch.testing.assert_close(back[name], start[name], atol=1e-6, rtol=0)
            else:
                assert torch.equal(back[name], away[name])
