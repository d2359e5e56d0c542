"""Recalibrated statistics are those of the data set's activations, whatever the ranks and the unreadable slots."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from penstock.backbones.batchnorm import BatchNorm, BatchNorms, convert, layers_of
from penstock.backbones.recalibrate import Recalibrated, moving, recalibrate
from penstock.errors import InputError
from penstock.streams.batch import Batch

SAMPLES = 48
BAD = (3, 17, 18, 40)


def _image(position: int, size: int = 6) -> Tensor:
    """A sample that tells its place: its mean and scale grow with it, so any slot left out or counted twice shows."""
    generator = torch.Generator().manual_seed(position)
    return torch.randn(3, size, size, generator=generator) * (1 + position / 10) + position / 4


def _batches(global_batch: int, rank: int = 0, world: int = 1, bad: tuple[int, ...] = (), size: int = 6) -> list[Batch]:
    found = []
    own = global_batch // world
    for start in range(0, SAMPLES, global_batch):
        positions = torch.arange(start + rank * own, start + (rank + 1) * own)
        images = torch.stack([_image(int(p), size) for p in positions])
        for slot, position in enumerate(positions.tolist()):
            if position in bad:
                images[slot] = 1e6
        weights = torch.tensor([0.0 if int(p) in bad else 1.0 for p in positions])
        found.append(Batch([images], torch.zeros(own, dtype=torch.int64), weights, positions))
    return found


def _model(mode: str = "sync") -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5),
    )  # fmt: skip
    net = BatchNorms(BatchNorms.Config(mode=mode)).apply(net)  # type: ignore[arg-type]
    net[4].eval()  # a part that someone froze
    return net


def _statistics(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.double().numpy().copy() for name, value in model.named_buffers() if "running" in name}


def _over_dataset(model: nn.Module, positions: list[int], size: int = 6) -> dict[str, np.ndarray]:
    """A slow transcription: every sample in one batch, each layer's activations in fp64, layer by layer."""
    x = torch.stack([_image(p, size) for p in positions]).double()
    found = {}
    for name, layer in copy.deepcopy(model).double().named_children():
        if isinstance(layer, BatchNorm):
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=1)
            found |= {f"{name}.running_mean": mean.detach().numpy(), f"{name}.running_var": var.detach().numpy()}
            scale = layer.weight.double() / (x.var((0, 2, 3), correction=0) + layer.eps).sqrt()
            x = (x - mean[:, None, None]) * scale[:, None, None] + layer.bias.double()[:, None, None]
        elif not isinstance(layer, nn.Dropout):
            x = layer(x)
    return found


def _recalibrated(
    rank: int, world: int, global_batch: int, samples: int, bad: tuple[int, ...] = (), mode: str = "sync"
) -> tuple[dict[str, np.ndarray], Recalibrated]:
    model = _model(mode)
    done = recalibrate(model, _batches(global_batch, rank, world, bad), lambda b: model(b.views[0]), samples)
    return _statistics(model), done


def test_statistics_are_those_of_the_whole_set():
    found, done = _recalibrated(0, 1, SAMPLES, SAMPLES)
    expected = _over_dataset(_model(), list(range(SAMPLES)))
    assert found.keys() == expected.keys() and done.samples == SAMPLES
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("global_batch", [2, 4, 12, 16])
def test_the_first_layers_do_not_depend_on_the_batch(global_batch):
    expected = _over_dataset(_model(), list(range(SAMPLES)))
    found, _ = _recalibrated(0, 1, global_batch, SAMPLES)
    for name in ("0.running_mean", "0.running_var"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4)
    # Below the mean of the batches' variances the part between batches would be missing: half of it and more here.
    within = np.mean([b.views[0].double().var((0, 2, 3)).numpy() for b in _batches(2)], axis=0)
    assert (found["0.running_var"] > 1.5 * within).all()


@pytest.mark.parametrize("mode", ["sync", "local"])
@pytest.mark.parametrize(("samples", "bad"), [(SAMPLES, ()), (26, BAD), (1000, BAD)])
def test_ranks_change_nothing(ranks, mode, samples, bad):
    expected, done = _recalibrated(0, 1, 8, samples, bad)
    readable = [p for p in range(SAMPLES) if p not in bad][:samples]
    assert done.samples == len(readable)
    exact = _over_dataset(_model(), readable)
    np.testing.assert_allclose(expected["0.running_mean"], exact["0.running_mean"], rtol=1e-4)
    for found, report in ranks(2).run(_recalibrated, 8, samples, bad, mode):
        assert report.samples == done.samples
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def _uneven(rank: int, world: int) -> int:
    """Rank 1's stream ends early: the ranks agree to stop there, and none waits for another."""
    model = _model()
    batches = _batches(8, rank, world)[: 4 if rank else None]
    return recalibrate(model, batches, lambda b: model(b.views[0]), SAMPLES).samples


def test_a_rank_that_ends_early_ends_it_for_all(ranks):
    assert ranks(2).run(_uneven) == [4 * 8] * 2


def test_every_other_state_stays():
    model = _model()
    model.train()
    model[4].eval()
    model(_batches(8)[0].views[0]).sum().backward()
    layers = layers_of(model)
    layers["6"].mode = "frozen"
    frozen = model[6].running_mean.clone()
    modes = {name: part.training for name, part in model.named_modules()}
    others = {name: value.clone() for name, value in model.state_dict().items() if "running" not in name}
    gradients = {name: param.grad.clone() for name, param in model.named_parameters()}
    seen = {
        name: (layer.batch_mean.clone(), layer.batch_samples, layer.valid)
        for name, layer in layers.items()
        if name != "6"
    }
    state = torch.get_rng_state()

    def forward(batch: Batch) -> None:
        torch.rand(3)
        assert not model[4].training and not model.training
        model(batch.views[0])

    recalibrate(model, _batches(8), forward, SAMPLES)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: part.training for name, part in model.named_modules()} == modes
    assert torch.equal(model[6].running_mean, frozen) and layers["6"].mode == "frozen"
    assert all(torch.equal(model.state_dict()[name], value) for name, value in others.items())
    assert all(torch.equal(param.grad, gradients[name]) for name, param in model.named_parameters())
    for name, (mean, samples, valid) in seen.items():
        layer = layers[name]
        assert torch.equal(layer.batch_mean, mean) and (layer.batch_samples, layer.valid) == (samples, valid)
        assert layer.observe is None and layer.mode == "sync"


def test_after_an_error_the_statistics_are_as_before():
    model = _model()
    before = _statistics(model)

    def forward(batch: Batch) -> None:
        model(batch.views[0])
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        recalibrate(model, _batches(8), forward, SAMPLES)
    for name, value in _statistics(model).items():
        np.testing.assert_array_equal(value, before[name])
    assert model.training and layers_of(model)["0"].observe is None


def test_nothing_to_calibrate_on_is_an_error():
    model = _model()
    before = _statistics(model)
    forward = lambda batch: model(batch.views[0])  # noqa: E731
    with pytest.raises(InputError, match="no readable sample"):
        recalibrate(model, _batches(8, bad=tuple(range(SAMPLES))), forward, SAMPLES)
    with pytest.raises(InputError, match="no readable sample"):
        recalibrate(model, [], forward, SAMPLES)
    with pytest.raises(InputError, match="over 0 samples"):
        recalibrate(model, _batches(8), forward, 0)
    with pytest.raises(InputError, match="no batch-norm layer"):
        recalibrate(nn.Linear(3, 3), _batches(8), forward, SAMPLES)
    for name, value in _statistics(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_layer_that_is_not_used_keeps_its_statistics():
    model = _model()
    spare = convert(nn.Sequential(nn.BatchNorm2d(3)))
    both = nn.ModuleList([model, spare])
    recalibrate(both, _batches(8), lambda b: model(b.views[0]), SAMPLES)
    assert spare[0].running_mean.tolist() == [0, 0, 0] and spare[0].running_var.tolist() == [1, 1, 1]  # type: ignore[index]


def test_averaged_weights_get_statistics_of_their_own():
    """The average of two networks' statistics is not that of the averaged network's activations."""
    first, second = _model(), _model()
    with torch.no_grad():
        second[1].weight.neg_().add_(0.1)
        for model in (first, second):
            recalibrate(model, _batches(SAMPLES), lambda b, m=model: m(b.views[0]), SAMPLES)
        merged = copy.deepcopy(first)
        for value, other in zip(merged.state_dict().values(), second.state_dict().values(), strict=True):
            if value.is_floating_point():
                value.copy_((value + other) / 2)
    wrong, exact = _statistics(merged), _over_dataset(merged, list(range(SAMPLES)))
    assert np.abs(wrong["2.running_var"] / exact["2.running_var"]).min() > 1.5
    done = recalibrate(merged, _batches(SAMPLES), lambda b: merged(b.views[0]), SAMPLES)
    for name, value in exact.items():
        np.testing.assert_allclose(_statistics(merged)[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    assert done.var_ratio > 2 and str(done).startswith("batch norm recalibrated over 48 samples")
    again = recalibrate(merged, _batches(SAMPLES), lambda b: merged(b.views[0]), SAMPLES)
    assert again.mean_shift < 1e-5 and again.var_ratio == pytest.approx(1, abs=1e-5)


def test_another_size_gets_its_own_statistics():
    model, found = _model(), {}
    for size in (6, 12):
        done = recalibrate(model, _batches(SAMPLES, size=size), lambda b: model(b.views[0]), SAMPLES)
        found[size] = _statistics(model)
        for name, value in _over_dataset(model, list(range(SAMPLES)), size).items():
            np.testing.assert_allclose(found[size][name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    assert np.abs(found[6]["6.running_var"] / found[12]["6.running_var"] - 1).max() > 0.02
    assert done.metrics()["recalibrate/samples"] == SAMPLES and done.var_ratio > 1.005


def test_closed_modules_keep_their_statistics():
    model = nn.ModuleDict({"low": _model(), "low2": _model()})
    before = _statistics(model)
    closed = ["low", "low2.0"]
    assert list(moving(model, closed)) == ["low2.2", "low2.6"] and not moving(model, ["low", "low2"])
    recalibrate(model, _batches(8), lambda b: [part(b.views[0]) for part in model.values()], SAMPLES, closed)
    moved = {name for name, value in _statistics(model).items() if not np.array_equal(value, before[name])}
    assert moved == {f"low2.{place}.{name}" for place in (2, 6) for name in ("running_mean", "running_var")}
