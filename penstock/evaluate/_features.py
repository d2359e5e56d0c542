"""Frozen features of a whole set: the same on every rank, in the same order for any number of ranks."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from penstock import distributed
from penstock.errors import InputError
from penstock.streams.batch import Batch


@dataclass(frozen=True)
class FeatureSet:
    """Features of every readable sample of a set, ordered by position, on the CPU."""

    features: Tensor  # fp32 [n, D]
    labels: Tensor  # int64 [n], -1 where there is none
    positions: Tensor  # int64 [n], increasing
    unreadable: int = 0  # samples left out as they could not be read

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor) -> "FeatureSet":
        return FeatureSet(self.features[index], self.labels[index], self.positions[index], self.unreadable)

    def to(self, device: torch.device) -> "FeatureSet":
        return FeatureSet(self.features.to(device), self.labels.to(device), self.positions.to(device), self.unreadable)


def extract(backbone: nn.Module, stream: Iterable[Batch], device: torch.device) -> FeatureSet:
    """Pooled features of the samples of `stream` that weigh more than 0, gathered over all ranks.

    Every rank must be handed the same number of batches of the same size. The backbone runs in eval mode and is left
    as it was, and so are the random generators, so that a run with evaluations equals one without.
    """
    parts: list[list[Tensor]] = []
    unreadable = 0
    with evaluating(backbone), _generators_kept(), torch.no_grad():
        for batch in stream:
            on_device = batch.to(device)
            pooled = _pooled(backbone, on_device.views[0])
            gathered = [
                distributed.gather(values).cpu()
                for values in (pooled, on_device.labels, on_device.positions, on_device.weights)
            ]
            keep = gathered.pop() > 0
            parts.append([values[keep] for values in gathered])
            unreadable += len(batch.faults)
    if not parts:
        raise InputError("there is nothing to evaluate on: the data holds no batch")
    features, labels, positions = (torch.cat(columns) for columns in zip(*parts, strict=True))
    if len(positions.unique()) != len(positions):
        raise ValueError("the stream served a sample twice, so its figures would be wrong")
    order = positions.argsort()
    total = int(distributed.all_sum(torch.tensor(unreadable, device=device)).item())
    return FeatureSet(features[order], labels[order], positions[order], total)


def _pooled(backbone: nn.Module, images: Tensor) -> Tensor:
    """fp32 features; the forward runs under the caller's autocast, or the one that half-precision weights need."""
    dtype = next(backbone.parameters()).dtype
    half = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(images.device.type, dtype) if half else nullcontext():
        return backbone(images).pooled.float()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In eval mode; each part is then again in the mode that it was in."""
    before = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in before.items():  # one by one: frozen parts of a training model stay in eval mode
            part.training = training


@contextmanager
def _generators_kept() -> Iterator[None]:
    python, legacy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def check_labels(train: FeatureSet, val: FeatureSet) -> int:
    """The number of classes; InputError when a set is empty or a sample has no label."""
    for name, part in (("training", train), ("validation", val)):
        if len(part) == 0:
            raise InputError(f"the {name} set has no readable sample, so there is nothing to evaluate on")
        missing = int((part.labels < 0).sum())
        if missing:
            raise InputError(
                f"evaluation needs labels, but {missing} of {len(part)} samples of the {name} set have none; pack it "
                "from a folder per class (`penstock shards pack`) or leave the evaluations out of the recipe"
            )
    return int(max(train.labels.max(), val.labels.max())) + 1


def keyed_order(features: FeatureSet, seed: int, draw: int = 0) -> Tensor:
    """A fixed random order of the rows, a function of (seed, draw, position) alone."""
    from penstock.keyed import uniform

    return uniform(seed, draw, features.positions, 1)[:, 0].argsort(stable=True)
