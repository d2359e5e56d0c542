"""Decays and options of optimizers, each against one line of a slow formula."""

import pytest
import torch
from torch import nn

from penstock.decay import Decay
from penstock.optim import Optim, write

KNOBS = {"lr": 0.1, "weight_decay": 0.5}


def stepped(config: dict, gradient: float | list[float], weight: list[float], knobs=KNOBS, steps=1) -> torch.Tensor:
    """A weight [1, n] of a linear layer after some steps with the same gradient."""
    task = nn.Linear(len(weight), 1, bias=False)
    task.weight.data.copy_(torch.tensor(weight))
    optimizer = Optim(Optim.Config(lr=0.1, **config)).build(task, 8)
    Decay(optimizer, ())
    for _ in range(steps):
        task.weight.grad = torch.zeros_like(task.weight) + torch.tensor(gradient)
        write(optimizer.param_groups, knobs, now=0)
        optimizer.step()
    return task.weight.detach()[0].double()


# With a gradient of zero, only the decay moves the weight. Coupled decay goes through the optimizer's own update.
@pytest.mark.parametrize("name", ["adamw", "sgdw", "nadamw", "lion"])
def test_decoupled_decay_shrinks_by_the_rate_times_the_decay(name):
    got = stepped({"name": name}, 0.0, [2.0, -3.0])
    torch.testing.assert_close(got, torch.tensor([2.0, -3.0]).double() * (1 - 0.1 * 0.5), atol=1e-6, rtol=0)


def test_coupled_decay_of_adam_moves_by_the_sign_alone():
    got = stepped({"name": "adam"}, 0.0, [2.0, -3.0])
    torch.testing.assert_close(got, torch.tensor([1.9, -2.9]).double(), atol=1e-6, rtol=0)


def test_coupled_decay_of_sgd_gathers_momentum():
    weight, buffer = 2.0, 0.0
    for _ in range(3):
        buffer = 0.9 * buffer + 0.5 * weight
        weight -= 0.1 * buffer
    got = stepped({"name": "momentum"}, 0.0, [2.0], steps=3)
    assert got.item() == pytest.approx(weight, abs=1e-6)
    decoupled = stepped({"name": "sgdw"}, 0.0, [2.0], steps=3)
    assert decoupled.item() == pytest.approx(2.0 * 0.95**3, abs=1e-6)


def adam(gradients, decay):
    """fp64 updates of Adam with betas .9 and .99, applied by `decay(weight, update, gradient)`, from ones."""
    weight, m, v = torch.ones(4).double(), torch.zeros(4).double(), torch.zeros(4).double()
    for step, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        weight = decay(weight, update, g)
    return weight


# The second gradient turns the sign of two entries, whose momentum still points the old way.
GRADIENTS = [torch.tensor(g).double() for g in ([1.0, 2.0, -1.0, 3.0], [0.5, -0.3, 0.4, 1.0])]


def two_steps(config: dict) -> torch.Tensor:
    task = nn.Linear(4, 1, bias=False)
    task.weight.data.fill_(1.0)
    optimizer = Optim(Optim.Config(lr=0.1, betas=(0.9, 0.99), **config)).build(task, 8)
    Decay(optimizer, ())
    for gradient in GRADIENTS:
        task.weight.grad = gradient[None].float()
        write(optimizer.param_groups, KNOBS, now=0)
        optimizer.step()
    return task.weight.detach()[0].double()


def test_cautious_updates_keep_what_agrees_with_the_gradient():
    """Liang et al. 2024: u * (u * g > 0) / mean(u * g > 0)."""
    agreed = []

    def cautious(weight, update, gradient):
        agrees = (update * gradient > 0).double()
        agreed.append(agrees.sum().item())
        return weight * (1 - 0.05) - 0.1 * update * agrees / agrees.mean()

    want = adam(GRADIENTS, cautious)
    assert agreed == [4, 2]
    torch.testing.assert_close(two_steps({"name": "cadamw"}), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["adamw", "adam"])  # the cautious decay is always decoupled
def test_cautious_decay_shrinks_only_what_the_update_shrinks(name):
    """Chen et al. 2025: w - lr * (u + decay * (u * w >= 0) * w)."""
    want = adam(GRADIENTS, lambda w, u, g: w - 0.1 * (u + 0.5 * (u * w >= 0) * w))
    plain = adam(GRADIENTS, lambda w, u, g: w - 0.1 * (u + 0.5 * w))
    assert (want - plain).abs().max() > 0.05
    got = two_steps({"name": name, "cautious_decay": True})
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_corrected_decay_falls_with_the_square_of_the_rate():
    """Defazio 2025 (AdamC): lr^2 / peak. The peak is 0.1 here."""
    got = stepped({"name": "adamc"}, 0.0, [2.0], {"lr": 0.02, "weight_decay": 0.5})
    assert got.item() == pytest.approx(2.0 * (1 - 0.02**2 / 0.1 * 0.5), abs=1e-6)


@pytest.mark.parametrize("config", [{"name": "cadamw"}, {"name": "nadamw", "options": {"caution": True}}])
def test_cautious_optimizers_need_whole_parameters(config):
    assert Optim.Config(lr=0.1, **config).needs_shapes
    assert not Optim.Config(lr=0.1, name="adamw", cautious_decay=True).needs_shapes


def test_what_the_help_says_about_decay():
    about = Optim.Config.model_fields["weight_decay"].description
    decoupled, coupled = about.split("(decoupled)")
    assert {"adamw", "sgdw"} <= set(decoupled.replace(",", " ").split())
    assert {"adam", "sgd"} <= set(coupled.replace(",", " ").replace(";", " ").split())


@pytest.mark.parametrize("name,key", [("adamw", "betas"), ("sgd", "momentum")])
def test_a_curve_of_momentum_reaches_the_groups(name, key):
    curve = {"name": "linear", "start": 0.95, "end": 0.85}
    config = Optim.Config(lr=0.1, name=name, momentum=curve)
    optimizer = Optim(config).build(nn.Linear(2, 1), 8)
    assert config.knobs["optim_momentum"] == config.momentum
    write(optimizer.param_groups, KNOBS | {"optim_momentum": 0.9}, now=0)
    values = [group[key] for group in optimizer.param_groups]
    assert all(value == ((0.9, 0.999) if key == "betas" else 0.9) for value in values)
    assert "optim_momentum" not in Optim.Config(lr=0.1).knobs and "l2_sp" not in Optim.Config(lr=0.1).knobs
