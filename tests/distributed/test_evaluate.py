"""Features and figures are the same for any number of ranks, and a run does not notice that it was evaluated."""

import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from penstock.errors import InputError
from penstock.evaluate import measure
from penstock.evaluate._features import FeatureSet, extract
from penstock.evaluate.knn import KNN
from penstock.evaluate.linear import LinearProbe
from penstock.streams.batch import Batch

TOTAL, SIZE = 103, 8
CPU = torch.device("cpu")


class Pooled(NamedTuple):
    pooled: Tensor


class Net(nn.Module):
    """A network in which training mode, dropout and batch statistics would show."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.5))

    def forward(self, images: Tensor) -> Pooled:
        return Pooled(self.model(images.flatten(1).float() / 64 - 2))


class Float(Net):
    """A network that leaves autocast by itself."""

    def forward(self, images: Tensor) -> Pooled:
        with torch.autocast("cpu", enabled=False):
            return super().forward(images)


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(TOTAL) % 5
    noise = torch.randint(0, 120, (TOTAL, 1, 4, 4), generator=generator)
    return (noise + 27 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels


def stream(rank: int, world: int, bad: tuple[int, ...] = ()) -> Iterator[Batch]:
    """Every sample once over the ranks; padding, and unreadable samples, weigh 0."""
    images, labels = samples()
    for first in range(rank * SIZE, -(-TOTAL // (SIZE * world)) * SIZE * world, SIZE * world):
        random.random(), torch.rand(1), np.random.rand()  # a stream may draw from every generator
        numbers = torch.arange(first, first + SIZE)
        real = (numbers < TOTAL) & ~torch.isin(numbers, torch.tensor(bad))
        rows = numbers.clamp(max=TOTAL - 1)
        view = torch.where(real.view(-1, 1, 1, 1), images[rows], 0)
        faults = [{"position": int(n)} for n in numbers if int(n) in bad]
        positions = torch.where(numbers < TOTAL, numbers, -1)
        yield Batch([view], torch.where(real, labels[rows], -1), real.float(), positions, faults=faults)


def _extract(rank: int, world: int, bad: tuple[int, ...]) -> tuple[np.ndarray, list[int], list[int], int]:
    found = extract(Net(), stream(rank, world, bad), CPU)
    return found.features.numpy(), found.labels.tolist(), found.positions.tolist(), found.unreadable


@pytest.mark.parametrize("world", [2, 4])
def test_features_are_gathered_exactly(ranks, world):
    bad = (3, 50, 102)
    images, labels = samples()
    keep = [n for n in range(TOTAL) if n not in bad]
    with torch.no_grad():
        expected = Net().eval()(images[keep]).pooled.numpy()
    for parts in ([_extract(0, 1, bad)], ranks(world).run(_extract, bad)):
        for features, got_labels, positions, unreadable in parts:
            np.testing.assert_allclose(features, expected, atol=1e-6)
            assert positions == keep and got_labels == labels[keep].tolist() and unreadable == len(bad)


def _measure(rank: int, world: int) -> dict[str, float]:
    evaluations = {"knn": KNN.Config(k=7), "linear": LinearProbe.Config(epochs=2, draws=3)}
    found = measure(Net(), evaluations, stream(rank, world), stream(rank, world, (5,)), CPU)
    return found.metrics | found.health


def test_figures_do_not_depend_on_the_ranks(ranks):
    alone = _measure(0, 1)
    for found in ranks(2).run(_measure):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            assert found[name] == pytest.approx(value, rel=1e-5), name


def test_figures_are_fp32_under_autocast():
    plain = _measure(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        features = extract(Net(), stream(0, 1), CPU)
        found = measure(Net(), {"knn": KNN.Config(k=7)}, stream(0, 1), stream(0, 1, (5,)), CPU)
    assert features.features.dtype == torch.float32
    assert torch.equal(features.features, features.features.bfloat16().float())  # the network did run in bf16
    assert found.metrics["knn_top1"] == pytest.approx(plain["knn_top1"], abs=2)
    with torch.autocast("cpu", torch.bfloat16):  # features in fp32: exactly the same figures
        assert measure(Float(), {"knn": KNN.Config(k=7)}, stream(0, 1), stream(0, 1, (5,)), CPU).metrics == {
            "knn_top1": plain["knn_top1"]
        }


def _sharded_knn(rank: int, world: int) -> float:
    generator = torch.Generator().manual_seed(0)
    train, val = (
        FeatureSet(
            torch.randn(n, 8, generator=generator), torch.randint(0, 4, (n,), generator=generator), torch.arange(n)
        )
        for n in (900, 1003)
    )
    return KNN(KNN.Config())(train, val)["knn_top1"]


def test_sharded_knn_equals_one_process(ranks):
    assert ranks(4).run(_sharded_knn) == [_sharded_knn(0, 1)] * 4


def test_a_run_does_not_notice():
    net = Net().train()
    net.model[1].eval()  # a frozen part
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    extract(net, stream(0, 1), CPU)
    assert [part.training for part in net.model] == [True, False, True, True] and net.training
    assert all(torch.equal(value, buffers[name]) for name, value in net.named_buffers())
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
    assert (np.random.get_state()[1] == generators[2]).all()
    assert all(param.grad is None for param in net.parameters())


def test_a_sample_served_twice_and_an_empty_stream_are_errors():
    with pytest.raises(ValueError, match="twice"):
        extract(Net(), [*stream(0, 1), *stream(0, 1)], CPU)
    with pytest.raises(InputError, match="nothing to evaluate"):
        extract(Net(), [], CPU)
