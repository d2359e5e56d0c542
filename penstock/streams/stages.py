"""What a stream does to its samples after augmentation: other members beside the views, and the user's own stages.

A stage is what webdataset calls one: a function from an iterator of samples to an iterator of samples, such as
`webdataset.map(f)`. It runs in the workers and is handed one sample at a time, so what it makes of a sample can depend
neither on the batch nor on the number of ranks and workers (unless it keeps a state of its own), and a stage that
changes the count of samples is caught at the sample where it does.
"""

import importlib
import operator
import re
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from penstock.errors import InputError
from penstock.keyed import seed_sample
from penstock.streams.batch import Batch
from penstock.streams.extras import Extras, check_present
from penstock.streams.faults import DROPPED
from penstock.streams.reader import Fault
from penstock.streams.timing import AUGMENT, READ, since

if TYPE_CHECKING:
    from penstock.streams.images import Images
    from penstock.streams.loader import Micro

Shape = tuple[torch.Size, torch.dtype]
Stage = Callable[[Iterator[dict[str, Any]]], Iterable[dict[str, Any]]]
DROP = "__drop__"
KEYED = 0x57A6E << 32  # numbers of stages in random keys begin with it, which no view's does
ADDRESS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def resolve(address: str) -> Stage:
    """The stage that `package.module:name` names; modules are found from the working directory, too.

    Raises ValueError when there is none. Addresses come from recipes, which are the user's own code; never from data.
    """
    if not ADDRESS.fullmatch(address):
        raise ValueError(f"{address!r} names no stage; write package.module:function")
    module, _, name = address.partition(":")
    here = str(Path.cwd())
    if "" not in sys.path and here not in sys.path:  # `penstock ...`, unlike `python -m`, does not look there
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # the user's module may raise anything
        raise ValueError(f"{address}: {module} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found) and not hasattr(found, "run"):
        what = "has no such name" if found is None else f"has a {type(found).__name__} of that name"
        raise ValueError(f"{address}: {module} {what}; write a function from an iterator of samples to one")
    return found


def name_of(stage: Any) -> str:
    """For people."""
    return getattr(stage, "__qualname__", None) or type(stage).__qualname__


class After:
    """Puts members and what stages make into batches, as `Batch.extra` (tensors) and `Batch.members` (lists).

    Args:
        extra: suffix by name, of the members that are read.
        stages: in turn; by address (`package.module:function`) or as they are.
    """

    @classmethod
    def of(cls, images: "Images", extra: dict[str, str], stages: Sequence[str | Stage], seed: int) -> "After | None":
        """None when there is nothing to do. Raises InputError when the set has none of a member."""
        if not extra and not stages:
            return None
        check_present(images.reader, extra)
        return cls(images, extra, stages, seed)

    def __init__(self, images: "Images", extra: dict[str, str], stages: Sequence[str | Stage], seed: int):
        self.images, self.seed = images, seed
        self.extras = Extras(images.reader, extra)
        self.stages = [(each, resolve(each)) if isinstance(each, str) else (name_of(each), each) for each in stages]
        self._shapes: dict[str, Shape] = {}  # of tensors, for a batch without a readable sample

    def __call__(self, batch: Batch, micro: "Micro") -> Batch:
        """The batch with members and stages applied; slots of weight 0 stay as they are."""
        from penstock.streams.loader import generators_kept

        before, spent = self.images.counters, defaultdict(float, batch.timing)
        found: list[dict[str, Any] | None] = []
        faults = {fault["position"]: fault for fault in batch.faults}
        labels, weights = batch.labels.clone(), batch.weights.clone()
        with generators_kept():
            for slot, position in enumerate(batch.positions.tolist()):
                sample, dropped = None, None
                if weights[slot] > 0:
                    sample, dropped = self._made(batch, micro, slot, spent)
                if dropped is not None:
                    weights[slot] = 0
                    faults[position] = self._fault(batch, micro, slot, dropped)
                    for view in batch.views:
                        view[slot] = 0
                if sample is not None:
                    labels[slot] = sample["label"]
                    for view, made in zip(batch.views, sample["views"], strict=True):
                        view[slot] = made
                found.append(sample)
        tensors, members = self._collated(batch, found)
        ordered = [faults[position] for position in batch.positions.tolist() if position in faults]
        for name, count in since(before, self.images.counters).items():
            spent[name] += count
        return replace(
            batch,
            labels=labels,
            weights=weights,
            faults=ordered,
            extra=batch.extra | tensors,
            members=members,
            timing=dict(spent),
        )

    def _made(
        self, batch: Batch, micro: "Micro", slot: int, spent: dict[str, float]
    ) -> tuple[dict[str, Any] | None, Fault | None]:
        """The sample after all stages; or why it must not count."""
        place = int(micro.shards[slot]), int(micro.samples[slot])
        began = perf_counter()
        try:
            members = self.extras.read(*place)
        except Fault as fault:
            return None, fault
        finally:
            spent[READ] += perf_counter() - began
        views = [view[slot].clone() for view in batch.views]  # else a stage that swaps two would lose one
        sample = {"__key__": batch.keys[slot], "views": views, "label": int(batch.labels[slot]), **members}
        key, began = self._key(micro, slot), perf_counter()
        for number, (name, stage) in enumerate(self.stages):
            seed_sample(*key, KEYED + number)
            sample = _passed(name, stage, sample)
            if DROP in sample:
                return None, Fault(f"{name} dropped it: {sample[DROP]}", DROPPED)
        spent[AUGMENT] += perf_counter() - began
        return sample, None

    def _key(self, micro: "Micro", slot: int) -> tuple[int, ...]:
        """Of the slot's random numbers, as for its views."""
        from penstock.streams.loader import POOL

        if micro.pool is None:
            return self.seed, int(micro.positions[slot])
        identity = self.images.reader.record(int(micro.shards[slot]), int(micro.samples[slot])).id
        return POOL, identity, int(micro.pool[slot])

    def _fault(self, batch: Batch, micro: "Micro", slot: int, why: Fault) -> dict[str, Any]:
        shard = self.images.manifest.shards[int(micro.shards[slot])].name
        where = {"position": int(batch.positions[slot]), "shard": shard, "key": batch.keys[slot]}
        return where | {"kind": why.kind, "reason": str(why)}

    def _collated(
        self, batch: Batch, found: list[dict[str, Any] | None]
    ) -> tuple[dict[str, torch.Tensor], dict[str, list[Any]]]:
        """Tensors stacked, with zeros in slots of weight 0; anything else as lists with None there."""
        made = [(key, sample) for key, sample in zip(batch.keys, found, strict=True) if sample is not None]
        names = {name: None for _, sample in made for name in sample if not _is_own(name)}  # in order
        tensors: dict[str, torch.Tensor] = {}
        members: dict[str, list[Any]] = {name: [None] * len(found) for name in self.extras.wanted}
        for name in names:
            values = [None if sample is None else sample.get(name) for sample in found]
            if not any(isinstance(value, torch.Tensor) for value in values):
                members[name] = values
                continue
            members.pop(name, None)
            if name in batch.extra:
                raise InputError(f"data.stages: {name!r} comes from elsewhere already; give it another name")
            self._shapes[name] = _same_shape(name, made)
        for name, (shape, dtype) in self._shapes.items():
            members.pop(name, None)
            blank = torch.zeros(shape, dtype=dtype)
            tensors[name] = torch.stack([blank if sample is None else sample[name] for sample in found])
        return tensors, members


def _passed(name: str, stage: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What a stage makes of a sample. Raises InputError unless it is that one sample, whole."""
    key, views = given["__key__"], given["views"]
    before = [(view.shape, view.dtype) for view in views]
    where = f"data.stages: {name}, at sample {key}:"
    try:
        run = stage.run if hasattr(stage, "run") else stage
        made = list(islice(run(iter([given])), 2))
    except InputError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        line = f"({last.filename}, line {last.lineno})"
        raise InputError(f"{where} {type(error).__name__}: {error} {line}") from error
    if not made:
        raise InputError(
            f"{where} it gave no sample back, which would break the count of samples. To leave one out, give it back "
            f"with a reason, sample[{DROP!r}] = 'too small': its slot then has weight 0 and is counted"
        )
    if len(made) > 1:
        raise InputError(
            f"{where} it gave more than one sample back, which would break the count of samples; for several servings "
            "of a sample, set data.repeats"
        )
    sample = made[0]
    if not isinstance(sample, dict) or sample.get("__key__") != key:
        what = f"sample {sample.get('__key__')!r}" if isinstance(sample, dict) else f"a {type(sample).__name__}"
        raise InputError(f"{where} it gave back {what}; give back the same dict, with its __key__ {key!r}")
    if DROP in sample:
        return sample
    after = sample.get("views")
    if not isinstance(after, list) or [(getattr(v, "shape", None), getattr(v, "dtype", None)) for v in after] != before:
        raise InputError(
            f"{where} `views` must stay a list of {len(before)} uint8 tensors of shape {[list(s) for s, _ in before]}; "
            "put anything else under a name of its own"
        )
    try:
        sample["label"] = operator.index(sample["label"])
    except (KeyError, TypeError):
        raise InputError(f"{where} `label` must stay a class number; put anything else under another name") from None
    return sample


def _is_own(name: str) -> bool:
    """Whether a key of a sample is the stream's, or webdataset's, and no member."""
    return name in ("views", "label") or name.startswith("__")


def _same_shape(name: str, made: list[tuple[str, dict[str, Any]]]) -> Shape:
    """Of a tensor that every sample must have. Raises InputError."""
    first, sample = next((key, sample) for key, sample in made if isinstance(sample.get(name), torch.Tensor))
    shape, dtype = sample[name].shape, sample[name].dtype
    for key, other in made:
        value = other.get(name)
        if not isinstance(value, torch.Tensor) or (value.shape, value.dtype) != (shape, dtype):
            what = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise InputError(
                f"data.stages: {name!r} is a tensor {dtype} {list(shape)} for sample {first} and {what} for {key}; "
                "tensors are stacked, so give them one shape, or give a NumPy array, which is handed over in a list"
            )
    return shape, dtype
