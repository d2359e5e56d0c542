"""What every pretraining method promises; a new file in `pretrain/methods` is tested the moment it exists."""

import numpy as np
import pytest
import torch

from penstock.engine import Engine
from penstock.optim import Optim, parameter_groups
from penstock.schedule import Clock, knobs_of, value_at
from pretrain.recipe import METHODS
from tests.contracts._tiny import BACKBONES, batch_of, recipe_of, task_of

CASES = [(method, backbone) for method in METHODS.names() for backbone in BACKBONES if recipe_of(method, backbone)]
EIGHT = list(range(8))
RATE = 0.005


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def recipe(request):
    return recipe_of(*request.param)


def knobs(recipe) -> dict[str, float]:
    clock = Clock(total=2, batch=8, epoch=24)
    return {name: value_at(knob, 0, clock) for name, knob in knobs_of(recipe.method).items()}


def gradients(task) -> dict[str, torch.Tensor]:
    return {name: param.grad for name, param in task.named_parameters() if param.requires_grad}


@pytest.mark.parametrize("method", METHODS.names())
def test_some_backbone_works(method):
    assert method in [accepted for accepted, _ in CASES]
    assert METHODS.get(method).Config().name == method


def test_every_parameter_learns(recipe):
    task = task_of(recipe)
    output = task(batch_of(recipe, EIGHT), knobs(recipe))
    output.loss.backward()
    assert output.loss.ndim == 0 and torch.isfinite(output.loss)
    assert float(output.weight) == 8
    assert all(not value.requires_grad and value.ndim == 0 for value in output.metrics.values())
    for name, grad in gradients(task).items():
        assert grad is not None and torch.isfinite(grad).all(), name
    inside = {name.startswith("backbone.") for name, grad in gradients(task).items() if grad.any()}
    assert inside == {True, False}, "the backbone and what is built on it both have gradients"


def test_what_stands_in_a_slot_of_weight_0_changes_nothing(recipe):
    losses, grads = [], []
    for noise in (0, 5000):
        task = task_of(recipe)
        output = task(batch_of(recipe, EIGHT, bad=(1, 6), noise_in_bad=noise), knobs(recipe))
        output.loss.backward()
        assert float(output.weight) == 6
        losses.append(output.loss.detach())
        grads.append(gradients(task))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_batch_without_valid_samples_gives_0_and_touches_every_parameter(recipe):
    task = task_of(recipe)
    output = task(batch_of(recipe, EIGHT, bad=tuple(EIGHT)), knobs(recipe))
    output.loss.backward()
    assert output.loss == 0 and output.weight == 0
    for name, grad in gradients(task).items():
        assert grad is not None and not grad.any(), name


def test_every_knob_is_used(recipe):
    now = knobs(recipe)
    loss = task_of(recipe)(batch_of(recipe, EIGHT), now).loss
    for name, value in now.items():
        changed = task_of(recipe)(batch_of(recipe, EIGHT), now | {name: value * 0.7}).loss
        assert not torch.equal(changed, loss), f"{name} changes nothing"


def test_draws_are_keyed_by_seed_and_position_alone(recipe):
    batch = batch_of(recipe, EIGHT)
    losses = []
    for generator in (1, 2):
        task = task_of(recipe, seed=3)
        torch.manual_seed(generator)
        losses.append(task(batch, knobs(recipe)).loss)
    assert torch.equal(*losses)


def test_pictures_are_for_people_and_leave_the_run_alone(recipe):
    task = task_of(recipe)
    before, generator = {k: v.clone() for k, v in task.state_dict().items()}, torch.get_rng_state()
    for picture in task.pictures(batch_of(recipe, EIGHT)).values():
        assert picture.dtype == torch.uint8 and picture.ndim == 3 and len(picture) == 3
    assert task.training and torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def two_steps(rank: int, world: int, case: tuple[str, str], bad: tuple[int, ...]) -> dict[str, np.ndarray]:
    recipe = recipe_of(*case)
    assert recipe is not None
    task = task_of(recipe)
    optimizer = Optim(Optim.Config(name="sgd", lr=RATE)).build(task, 8)
    engine = Engine(task, optimizer, recipe.engine, 8 // world)
    for step in range(2):
        share = 8 // world
        batch = batch_of(recipe, [8 * step + rank * share + i for i in range(share)], bad)
        now = knobs(recipe) | {"lr": RATE, "weight_decay": 0.1}
        engine.set(now)
        engine.begin(batch.weights.sum())
        engine.backward(engine.forward(batch, now))
        assert engine.step().applied
        task.after_step(engine, now)
    return {name: value.numpy() for name, value in engine.weights().items()}


def test_two_ranks_equal_one_process(recipe, ranks):
    """Two steps by DeepSpeed, ranks with different data and one unreadable sample, against torch's SGD on it all."""
    bad = (2, 13)
    backbone = next(name for name, fields in BACKBONES.items() if fields["name"] == recipe.backbone.name)
    parts = ranks(2).run(two_steps, (recipe.method.name, backbone), bad)
    task = task_of(recipe)
    start = {name: param.detach().clone() for name, param in task.named_parameters()}
    groups = [{"params": g.params, "weight_decay": 0.1 * g.decayed} for g in parameter_groups(task)]
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9, nesterov=True)
    for step in range(2):
        optimizer.zero_grad()
        task(batch_of(recipe, [8 * step + i for i in range(8)], bad), knobs(recipe)).loss.backward()
        optimizer.step()
    moved = {name: param.detach() for name, param in task.named_parameters() if param.requires_grad}
    for part in parts:
        for name, value in moved.items():
            apart, way = (value - torch.from_numpy(part[name])).norm(), (value - start[name]).norm()
            assert apart <= 0.01 * way + 2e-5, f"{name}: {apart} apart after a way of {way}"
