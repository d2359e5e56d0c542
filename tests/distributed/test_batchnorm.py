"""Synchronised batch normalisation against torch's, in one process, on the concatenated valid rows, in float64."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.utils.checkpoint import checkpoint

from penstock.backbones.batchnorm import BatchNorm, BatchNorms, average_statistics, convert, layers_of, set_valid
from penstock.backbones.batchnorm_health import BatchNormHealth, batchnorm_health
from penstock.engine import Engine
from penstock.optim import Optim
from penstock.streams.batch import Batch
from penstock.task import StepOutput, Task, weighted_mean
from tests.toy import toy_batch

SHAPES = {"vectors": (8, 3), "maps": (8, 3, 4, 5)}


def _inputs(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that differ in mean and scale (so do the ranks that take slices of them), their loss weights, validity."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    grow = torch.arange(1, 9, dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    valid = torch.tensor([1, 1, 0, 0, 1, 0, 1, 1], dtype=torch.bool)
    return x * grow + 10 * grow, torch.randn(shape, generator=generator, dtype=torch.float64), valid


def _layer(kind: type, affine: bool = True) -> Any:
    layer = kind(3, affine=affine).double()
    if affine:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.5, 1.0, -2.0]))
            layer.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    return layer


def _run(layer: Any, x: torch.Tensor, pull: torch.Tensor) -> dict[str, np.ndarray]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * pull).sin().sum().backward()
    found = {"y": y, "grad": x.grad, "mean": layer.running_mean, "var": layer.running_var}
    if layer.weight is not None:
        found |= {"grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad}
    return {name: value.detach().numpy().copy() for name, value in found.items()}


def _rank_part(rank: int, world: int, shape: tuple[int, ...], masked: bool, affine: bool) -> dict[str, np.ndarray]:
    x, pull, valid = (part.chunk(world)[rank] for part in _inputs(shape))
    layer = _layer(BatchNorm, affine)
    if masked:
        set_valid(layer, valid.float())
        pull = pull * valid.view(-1, *[1] * (x.ndim - 1))
    return _run(layer, x, pull)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("masked", "affine"), [(False, True), (True, True), (True, False)])
def test_equals_one_process(ranks, world, shape, masked, affine):
    x, pull, valid = _inputs(shape)
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    rows = valid if masked else torch.ones(8, dtype=torch.bool)
    expected = _run(_layer(kind, affine), x[rows], pull[rows])
    if world == 1:
        parts = [_rank_part(0, 1, shape, masked, affine)]
    else:
        parts = ranks(world).run(_rank_part, shape, masked, affine)
    for name in ("y", "grad"):
        whole = np.concatenate([part[name] for part in parts])
        np.testing.assert_allclose(whole[rows], expected[name], rtol=1e-10, atol=1e-10, err_msg=name)
        assert np.isfinite(whole).all()
    assert (np.concatenate([part["grad"] for part in parts])[~rows] == 0).all()
    for part in parts:  # running statistics are the same on every rank
        np.testing.assert_allclose(part["mean"], expected["mean"], rtol=1e-12)
        np.testing.assert_allclose(part["var"], expected["var"], rtol=1e-12)
    for name in ("grad_weight", "grad_bias") if affine else ():
        np.testing.assert_allclose(sum(part[name] for part in parts), expected[name], rtol=1e-10, err_msg=name)


def _nothing_valid(rank: int, world: int) -> list[float]:
    layer = BatchNorm(3)
    set_valid(layer, torch.zeros(4))
    x = torch.randn(4, 3, requires_grad=True)
    layer(x).sum().mul(0).backward()
    assert x.grad is not None and bool((x.grad == 0).all())
    return [*layer.running_mean.tolist(), *layer.running_var.tolist()]


def test_no_valid_sample_anywhere_leaves_the_statistics(ranks):
    assert ranks(2).run(_nothing_valid) == [[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]] * 2


def _half(rank: int, world: int) -> tuple[str, np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(rank)
    x = (torch.randn(64, 3, 8, 8, generator=generator) + 30).bfloat16()
    layer = BatchNorm(3, momentum=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    return str(y.dtype), layer.running_mean.numpy(), x.double().numpy()


def test_statistics_are_float32_under_autocast(ranks):
    parts = ranks(2).run(_half)
    exact = np.concatenate([part[2] for part in parts]).mean((0, 2, 3))
    for dtype, mean, _ in parts:
        assert dtype == "torch.bfloat16"
        np.testing.assert_allclose(mean, exact, rtol=1e-6)  # bf16 accumulation is off by 1e-3


def test_convert_keeps_outputs_names_and_parameters():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
    names, parameters = list(model.state_dict()), list(model.parameters())
    other = timm.create_model("efficientnet_lite0", num_classes=0).eval()  # BatchNormAct2d
    with torch.no_grad():
        before_other = other(images)
    for module in (model, other):
        convert(module)
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms and all(isinstance(norm, BatchNorm) for norm in norms)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with torch.no_grad():
        assert torch.equal(model(images), before)
        assert torch.equal(other(images), before_other)


def test_one_process_trains_as_torch_does():
    torch.manual_seed(0)
    x, ours, theirs = torch.randn(6, 3, 4, 4), BatchNorm(3), nn.BatchNorm2d(3)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)


# Statistics of each rank ------------------------------------------------------------


def _local_part(rank: int, world: int, shape: tuple[int, ...], masked: bool) -> dict[str, np.ndarray]:
    x, pull, valid = (part.chunk(world)[rank] for part in _inputs(shape))
    layer = _layer(BatchNorm)
    layer.mode = "local"
    if masked:
        set_valid(layer, valid.float())
        pull = pull * valid.view(-1, *[1] * (x.ndim - 1))
    return _run(layer, x, pull)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_local_statistics_are_those_of_each_rank(ranks, shape, masked):
    x, pull, valid = _inputs(shape)
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    parts = ranks(2).run(_local_part, shape, masked)
    for rank, part in enumerate(parts):
        rows = valid.chunk(2)[rank] if masked else torch.ones(4, dtype=torch.bool)
        expected = _run(_layer(kind), x.chunk(2)[rank][rows], pull.chunk(2)[rank][rows])
        for name, value in expected.items():
            found = part[name][rows] if name in ("y", "grad") else part[name]
            np.testing.assert_allclose(found, value, rtol=1e-10, atol=1e-10, err_msg=name)


STEPS, ROWS = 100, 256


def _stream(rank: int, step: int) -> torch.Tensor:
    """Ranks that differ in mean and scale, and steps that differ a little."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(ROWS, 3, generator=generator) * (1 + rank) + torch.tensor([0.0, 5.0, -2.0]) * rank


def _averaged(rank: int, world: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    model: Any = BatchNorms(BatchNorms.Config(mode="local")).apply(nn.Sequential(nn.BatchNorm1d(3)))
    for step in range(STEPS):
        model(_stream(rank, step))
    before = _health_of(model)
    average_statistics(model)
    after = _health_of(model)
    return model[0].running_mean.numpy(), model[0].running_var.numpy(), before.rank_gap, after.rank_gap


def test_averaged_statistics_are_those_of_one_process(ranks):
    parts = ranks(2).run(_averaged)
    whole = nn.BatchNorm1d(3)
    for step in range(STEPS):
        whole(torch.cat([_stream(rank, step) for rank in range(2)]))
    for mean, var, before, after in parts:
        np.testing.assert_array_equal(mean, parts[0][0])  # the same to the last bit on every rank
        np.testing.assert_array_equal(var, parts[0][1])
        np.testing.assert_allclose(mean, whole.running_mean, rtol=1e-5, atol=1e-5)
        # A running mean is smoother than a batch's; that, and n / (n - 1), leave less than a per cent.
        np.testing.assert_allclose(var, whole.running_var, rtol=0.01)
        assert before > 0.5 and after == 0.0
    plain = (1 + 4) / 2  # the mean of the ranks' variances, without the part between them
    assert whole.running_var[1] > 3 * plain


def test_one_process_has_nothing_to_average():
    layer = BatchNorm(3)
    layer.mode = "local"
    layer(torch.randn(8, 3))
    before = layer.running_var.clone()
    average_statistics(layer)
    assert torch.equal(layer.running_var, before)


# Frozen ------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_means_frozen(affine):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model: Any = nn.ModuleList([timm.create_model(name, num_classes=3) for name in ("resnet10t", "efficientnet_lite0")])
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for part in model:
            part(images)  # statistics that are not the initial ones
    model = BatchNorms(BatchNorms.Config(mode="frozen", affine=affine)).apply(model).train()
    norms = layers_of(model)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    weights = {name: layer.weight.detach().clone() for name, layer in norms.items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    with torch.no_grad():
        trained = [part.train()(images) for part in model]
        assert all(torch.equal(y, part.eval()(images)) for y, part in zip(trained, model, strict=True))
    for _ in range(3):
        optimizer.zero_grad()
        sum(part.train()(images).square().mean() for part in model).backward()
        optimizer.step()
    assert norms and all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    moved = [not torch.equal(layer.weight, weights[name]) for name, layer in norms.items()]
    assert sum(moved) > len(moved) / 2 if affine else not any(moved)
    health = _health_of(model)
    assert health.effective_batch == 0 and "health/bn_drift" not in health.metrics()


# Precision ------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sync", "local", "frozen"])
@pytest.mark.parametrize("masked", [False, True])
def test_bf16_weights_keep_float32_statistics(mode, masked):
    torch.manual_seed(0)
    model: Any = BatchNorms(BatchNorms.Config(mode=mode)).apply(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    for param in model.parameters():  # as DeepSpeed's bf16 does: weights are cast, buffers are not
        param.data = param.data.bfloat16()
    set_valid(model, torch.tensor([1.0, 1.0, 0.0 if masked else 1.0]))
    x = torch.randn(3, 3, 4, 4, dtype=torch.bfloat16)
    y = model(x)
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16 and model.eval()(x).dtype == torch.bfloat16
    assert {model[1].running_mean.dtype, model[1].running_var.dtype} == {torch.float32}
    assert model[1].weight.grad.dtype == torch.bfloat16 and bool(model[0].weight.grad.isfinite().all())


# Options and health ------------------------------------------------------------


def test_momentum_is_set_or_kept():
    model: Any = nn.Sequential(nn.BatchNorm1d(3, momentum=0.03))
    assert BatchNorms(BatchNorms.Config()).apply(model)[0].momentum == 0.03  # type: ignore[index]
    assert BatchNorms(BatchNorms.Config(momentum=0.5)).apply(model)[0].momentum == 0.5  # type: ignore[index]


def test_momentum_none_averages_batches_that_held_a_sample():
    layer, x = BatchNorm(3, momentum=None), torch.randn(3, 4, 3)
    for batch, weight in zip(x, ([1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]), strict=True):
        set_valid(layer, torch.tensor(weight))
        layer(batch)
    torch.testing.assert_close(layer.running_mean, (x[0].mean(0) + x[2].mean(0)) / 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"affine": False}, "affine: false goes with mode: frozen"),
        ({"mode": "frozen", "momentum": 0.1}, "momentum: frozen statistics never move"),
        ({"mode": "frozen", "recalibrate": 100}, "recalibrate: frozen statistics never move"),
        ({"momentum": 0.0}, "greater than 0"),
    ],
)
def test_options_that_contradict_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        BatchNorms.Config(**values)


def test_a_single_value_per_channel_is_refused():
    with pytest.raises(ValueError, match="more than one value per channel"):
        BatchNorm(3)(torch.randn(1, 3))


def _health_of(module: nn.Module) -> BatchNormHealth:
    health = batchnorm_health(module)
    assert health is not None
    return health


def _health(rank: int, world: int, mode: str) -> dict[str, float]:
    model = BatchNorms(BatchNorms.Config(mode=mode)).apply(nn.Sequential(nn.BatchNorm1d(3, momentum=1.0)))
    model(_stream(rank, 0))
    return _health_of(model).metrics()


@pytest.mark.parametrize(("mode", "batch"), [("sync", 2 * ROWS), ("local", ROWS)])
def test_health_over_ranks(ranks, mode, batch):
    for metrics in ranks(2).run(_health, mode):
        assert metrics["health/bn_effective_batch"] == batch
        assert metrics["health/bn_drift"] == pytest.approx(0, abs=1e-6)  # momentum 1: the batch is the statistics
        assert metrics["health/bn_rank_gap"] == (0 if mode == "sync" else pytest.approx(2.5 / 2.5**0.5, rel=0.1))


def test_health_names_the_layer_that_died():
    model: Any = convert(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2)))
    with torch.no_grad():
        model[1].weight[1] = model[1].bias[1] = 0
    for _ in range(200):
        model(torch.randn(16, 3))
    health = _health_of(model)
    assert health.layer == "2" and health.smallest_var < 1e-6 and health.layers == 2
    assert "smallest variance" in str(health) and "over 16 samples" in str(health)
    assert 0 < health.drift < 1.5
    assert batchnorm_health(nn.Linear(2, 2)) is None
    assert _health_of(nn.BatchNorm1d(3)).effective_batch == 0  # torch's own: what it keeps is known


def test_compiled_steps_keep_statistics():
    model: Any = convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    twin = copy.deepcopy(model)
    model.compile(backend="eager", fullgraph=True)
    x = torch.randn(8, 3)
    for _ in range(2):
        torch.testing.assert_close(model(x), twin(x))
    torch.testing.assert_close(model[1].running_var, twin[1].running_var)
    assert _health_of(model) == _health_of(twin)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_a_batch_once(masked, reentrant):
    plain = convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)))
    twin = copy.deepcopy(plain)
    x = torch.randn(8, 3, requires_grad=True)
    for model in (plain, twin):
        set_valid(model, torch.tensor([1.0] * 7 + [0.0 if masked else 1.0]))
    plain(x).square().sum().backward()
    checkpoint(twin, x, use_reentrant=reentrant).square().sum().backward()
    for (name, value), other in zip(plain.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    for one, other in zip(plain.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


class Normed(Task):
    """The smallest task with a convolution and a batch norm."""

    def __init__(self, mode: str):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Module()  # type: ignore[assignment]
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        self.net = BatchNorms(BatchNorms.Config(mode=mode)).apply(net)  # type: ignore[arg-type]

    def forward(self, batch: Batch, knobs: Mapping[str, float]) -> StepOutput:
        set_valid(self, batch.weights)
        out = self.net((batch.views[0] / 255).to(self.net[0].weight.dtype))  # type: ignore[index]
        return StepOutput(weighted_mean(out.float().square().sum(1), batch.weights), batch.weights.sum())


def _engine_steps(rank: int, world: int, precision: str, mode: str) -> tuple[dict[str, np.ndarray], set[str], float]:
    task = Normed(mode)
    config = Engine.Config(zero=1, precision=precision)  # type: ignore[arg-type]
    engine = Engine(task, Optim(Optim.Config(lr=0.1, name="sgd")).build(task, 8), config, 4)
    for step in range(3):
        batch = toy_batch(torch.arange(8 * step + 4 * rank, 8 * step + 4 * rank + 4), bad=(5, 6))
        engine.set({"lr": 0.1, "weight_decay": 0.0})
        engine.begin(batch.weights.sum())
        engine.backward(engine.forward(batch, {}))
        assert engine.step().applied
    average_statistics(task)
    layer: Any = layers_of(task)["net.1"]
    dtypes = {str(layer.running_mean.dtype), str(layer.running_var.dtype)}
    gap = batchnorm_health(task).rank_gap  # type: ignore[union-attr]
    return {name: value.numpy() for name, value in engine.weights().items()}, dtypes, gap


@pytest.mark.parametrize("mode", ["sync", "local", "frozen"])
def test_engine_in_every_precision(ranks, mode):
    found = {p: ranks(2).run(_engine_steps, p, mode) for p in ("fp32", "bf16", "bf16_pure")}
    for precision, parts in found.items():
        for weights, dtypes, gap in parts:
            assert dtypes == {"torch.float32"} and gap == 0
            for name, value in weights.items():
                np.testing.assert_array_equal(value, parts[0][0][name])
                if "num_batches" not in name:
                    near = found["fp32"][0][0][name]
                    np.testing.assert_allclose(value, near, atol=0.05, err_msg=f"{precision} {name}")
        moved = not np.array_equal(parts[0][0]["net.1.running_var"], np.ones(4))
        assert moved == (mode != "frozen")
