"""Synchronised batch normalisation against torch's, in one process, on the concatenated valid rows, in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from penstock.backbones.batchnorm import BatchNorm, convert, set_valid

SHAPES = {"vectors": (8, 3), "maps": (8, 3, 4, 5)}


def _inputs(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that differ in mean and scale (so do the ranks that take slices of them), their loss weights, validity."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    grow = torch.arange(1, 9, dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    valid = torch.tensor([1, 1, 0, 0, 1, 0, 1, 1], dtype=torch.bool)
    return x * grow + 10 * grow, torch.randn(shape, generator=generator, dtype=torch.float64), valid


def _layer(kind: type, affine: bool = True) -> nn.Module:
    layer = kind(3, affine=affine).double()
    if affine:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.5, 1.0, -2.0]))
            layer.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    return layer


def _run(layer: nn.Module, x: torch.Tensor, pull: torch.Tensor) -> dict[str, np.ndarray]:
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
