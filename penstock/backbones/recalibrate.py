"""Batch-norm statistics computed anew over a fixed number of samples, for weights that were averaged or a new size."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from penstock import distributed
from penstock.backbones.batchnorm import BatchNorm, layers_of
from penstock.errors import InputError


class Weighted(Protocol):
    """What recalibration reads of a batch; `penstock.streams.batch.Batch` has it."""

    @property
    def weights(self) -> Tensor: ...  # float [B], 0 for a slot that holds no sample

    @property
    def positions(self) -> Tensor: ...  # int64 [B], place in the order


@dataclass(frozen=True)
class Recalibrated:
    """What `recalibrate` did."""

    samples: int  # samples that counted, over all ranks
    mean_shift: float  # how far the means moved, root mean square over a layer's channels, in standard deviations
    var_ratio: float  # the factor by which a variance grew or shrank, geometric mean over a layer's channels
    layer: str  # the layer whose means moved most

    def metrics(self) -> dict[str, float]:
        return {
            "recalibrate/samples": self.samples,
            "recalibrate/mean_shift": self.mean_shift,
            "recalibrate/var_ratio": self.var_ratio,
        }

    def __str__(self) -> str:
        return (
            f"batch norm recalibrated over {self.samples} samples: means moved by up to {self.mean_shift:.3g} standard "
            f"deviations ({self.layer}), variances by up to a factor {self.var_ratio:.3g}"
        )


class _Pool:
    """Statistics over all batches seen: count, mean [C] and sum of squared deviations [C], in fp64."""

    def __init__(self, like: Tensor):
        self.count = torch.zeros((), dtype=torch.float64, device=like.device)
        self.mean, self.squares = (
            torch.zeros_like(like, dtype=torch.float64),
            torch.zeros_like(like, dtype=torch.float64),
        )

    def add(self, count: Tensor, mean: Tensor, var: Tensor) -> None:
        """One more batch, by the parallel formula of Chan et al. (1979)."""
        count, mean, var = count.double().squeeze(), mean.double(), var.double()
        total = (self.count + count).clamp(min=1)
        apart = mean - self.mean
        self.mean += apart * (count / total)
        self.squares += count * var + apart.square() * (self.count * count / total)
        self.count += count

    def var(self) -> Tensor:
        """Unbiased, as running statistics are."""
        return self.squares / (self.count - 1).clamp(min=1)


@torch.no_grad()
def recalibrate(
    module: nn.Module,
    batches: Iterable[Weighted],
    forward: Callable[[Any], Any],
    samples: int,
    closed: Collection[str] = (),
) -> Recalibrated:
    """Set every running mean and variance in `module` to those of its activations over `samples` samples.

    The activations are those of evaluation, without dropout or drop path, except that each layer below normalises by
    the statistics of its own batch, taken over all ranks (precise BN, Wu and Johnson 2021). So the result does not
    depend on the number of ranks, and on the size of a global batch only through the layers below; the first layer's
    is exact. The same number of samples counts whatever the batch: of the last one, those that come first in the
    order. Slots of weight 0 count nowhere. Frozen layers, modes, gradients and random numbers stay as they were, and
    after an error the statistics, too. Every rank calls it, and averages of ranks are not needed after it.

    Args:
        module: its batch normalisation is ours (`convert`).
        batches: this rank's micro-batches; if they end before `samples`, those there were count.
        forward: runs the module on one of them; it moves them to the device, and applies the precision of evaluation.
        closed: modules within it, by name, whose statistics stay as those of frozen layers do.

    Raises:
        InputError: nothing to calibrate, or not one sample to calibrate it on.
    """
    layers = moving(module, closed)
    if not layers:
        raise InputError("batchnorm.recalibrate: no batch-norm layer has statistics that move; set it to 0")
    if samples < 1:
        raise InputError(f"batchnorm.recalibrate: statistics over {samples} samples do not exist; give 1 or more")
    before = {name: (_mean(x).clone(), _var(x).clone(), _tracked(x)) for name, x in layers.items()}
    pools = {name: _Pool(_mean(layer)) for name, layer in layers.items()}
    counted = 0
    with _calibrating(module, layers, pools):
        try:
            for batch, valid, number in _first(batches, samples):
                for layer in layers.values():
                    layer.valid = valid.to(_mean(layer).device)
                forward(batch)
                counted += number
        finally:
            for name, layer in layers.items():
                _mean(layer).copy_(before[name][0])
                _var(layer).copy_(before[name][1])
                if layer.num_batches_tracked is not None:
                    layer.num_batches_tracked.fill_(before[name][2])
    if counted == 0:
        raise InputError(
            "batchnorm.recalibrate: the stream held no readable sample, so the statistics stay; give it data, or set 0"
        )
    for name, layer in layers.items():
        if bool(pools[name].count > 0):  # a layer that this forward does not use keeps what it has
            _mean(layer).copy_(pools[name].mean)
            _var(layer).copy_(pools[name].var())
    return _report(layers, before, counted)


def moving(module: nn.Module, closed: Collection[str] = ()) -> dict[str, BatchNorm]:
    """The layers of `module` whose statistics move, by name; none of those in the modules named in `closed`."""
    return {
        name: layer
        for name, layer in layers_of(module).items()
        if layer.mode != "frozen"
        and layer.running_mean is not None
        and not any(f"{name}.".startswith(f"{each}.") for each in closed)
    }


def _first(batches: Iterable[Weighted], samples: int) -> Iterator[tuple[Weighted, Tensor, int]]:
    """Batches until `samples` valid ones are reached over all ranks, with the slots [B] that count here, and how many
    do on all ranks. Every rank gets as many batches, with a collective each, so that none waits for another."""
    mine, left = iter(batches), samples
    while left > 0:
        batch = next(mine, None)
        here = None if batch is None else batch.positions[batch.weights > 0].tolist()
        everyone = distributed.collect(here)
        if batch is None or any(each is None for each in everyone):
            return
        served = sorted(position for each in everyone for position in each)
        last = served[:left][-1] if served else -1
        number = min(len(served), left)
        yield batch, (batch.weights > 0) & (batch.positions <= last), number
        left -= number


@contextmanager
def _calibrating(module: nn.Module, layers: dict[str, BatchNorm], pools: dict[str, _Pool]) -> Iterator[None]:
    """Evaluation, but for batch norm, which takes statistics over all ranks; everything is put back at the end."""
    training = {part: part.training for part in module.modules()}
    own = {name: (layer.mode, layer.valid, layer.batch_mean, layer.batch_samples) for name, layer in layers.items()}
    devices = {value.device.index for value in module.buffers() if value.device.type == "cuda"}
    module.eval()
    for name, layer in layers.items():
        layer.training, layer.mode, layer.observe = True, "sync", pools[name].add
    try:
        with torch.random.fork_rng(devices=sorted(device for device in devices if device is not None)):
            yield
    finally:
        for part, was in training.items():
            part.training = was
        for name, layer in layers.items():
            layer.mode, layer.valid, layer.batch_mean, layer.batch_samples = own[name]
            layer.observe = None


def _report(layers: dict[str, BatchNorm], before: dict[str, tuple[Tensor, Tensor, int]], counted: int) -> Recalibrated:
    shifts, ratios = {}, {}
    for name, layer in layers.items():
        mean, var, _ = before[name]
        now = _var(layer).double() + layer.eps
        shifts[name] = float(((_mean(layer).double() - mean).square() / now).mean().sqrt())
        ratios[name] = float((now / (var.double() + layer.eps)).log().abs().mean().exp())
    most = max(shifts, key=lambda name: shifts[name])
    return Recalibrated(counted, shifts[most], max(ratios.values()), most)


def _mean(layer: BatchNorm) -> Tensor:
    assert layer.running_mean is not None
    return layer.running_mean


def _var(layer: BatchNorm) -> Tensor:
    assert layer.running_var is not None
    return layer.running_var


def _tracked(layer: BatchNorm) -> int:
    return 0 if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
