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
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from penstock.errors import InputError
from penstock.keyed import seed_sample
from penstock.streams.batch import Batch
from penstock.streams.extras import Extras
from penstock.streams.faults import DROPPED
from penstock.streams.kinds import Kinds
from penstock.streams.sets.storage import Fault
from penstock.streams.timing import AUGMENT, READ, since

if TYPE_CHECKING:
    from penstock.augment import Augment
    from penstock.streams.images import Images
    from penstock.streams.loader import Micro

Stage = Callable[[Iterator[dict[str, Any]]], Iterable[dict[str, Any]]]
DROP = "__drop__"
TRIED = 1024  # samples of a set, spread over it, of which one must come through the stages
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

    Which names a batch has is learned from a sample of the set, the same on all ranks and workers, whatever they hold.

    Args:
        extra: suffix by name, of the members that are read.
        stages: in turn; by address (`package.module:function`) or as they are.
    """

    @classmethod
    def of(
        cls, images: "Images", augment: "Augment", extra: dict[str, str], stages: Sequence[str | Stage], seed: int
    ) -> "After | None":
        """None when there is nothing to do."""
        return cls(images, augment, extra, stages, seed) if extra or stages else None

    def __init__(
        self, images: "Images", augment: "Augment", extra: dict[str, str], stages: Sequence[str | Stage], seed: int
    ):
        self.images, self.augment, self.seed = images, augment, seed
        self.extras = Extras(images.reader, extra)
        self.stages = [(each, resolve(each)) if isinstance(each, str) else (name_of(each), each) for each in stages]
        self._kinds: dict[tuple[torch.Size, ...], Kinds] = {}  # by the views' shapes

    def __call__(self, batch: Batch, micro: "Micro") -> Batch:
        """The batch with members and stages applied; slots of weight 0 stay as they are."""
        from penstock.streams.loader import generators_kept

        kinds = self._kinds_of(batch, micro)
        before, spent = self.images.counters, defaultdict(float, batch.timing)
        found: list[dict[str, Any] | None] = []
        faults = {fault["position"]: fault for fault in batch.faults}
        labels, weights = batch.labels.clone(), batch.weights.clone()
        with generators_kept():
            for slot, position in enumerate(batch.positions.tolist()):
                sample = None
                if weights[slot] > 0:
                    try:
                        sample, makers = self._made(batch, micro, slot, spent)
                        kinds.check(sample, makers)
                    except Fault as fault:
                        weights[slot] = 0
                        faults[position] = self._fault(batch, micro, slot, fault)
                        for view in batch.views:
                            view[slot] = 0
                if sample is not None:
                    labels[slot] = sample["label"]
                    for view, made in zip(batch.views, sample["views"], strict=True):
                        view[slot] = made
                found.append(sample)
        tensors, members = kinds.collated(found, self.extras.wanted)
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

    def _kinds_of(self, batch: Batch, micro: "Micro") -> Kinds:
        """Of the first sample, of some spread over the set, that comes through the stages.

        Raises InputError when none does.
        """
        from penstock.streams.loader import assemble, generators_kept

        if not self.stages:
            return Kinds({"__key__": "", **dict.fromkeys(self.extras.wanted)}, {})
        views = tuple(view.shape[1:] for view in batch.views)
        if views in self._kinds:
            return self._kinds[views]
        first, zero = np.cumsum([0, *(shard.samples for shard in self.images.manifest.shards)]), np.zeros(1, np.int64)
        for number in np.unique(np.linspace(0, first[-1] - 1, TRIED).astype(np.int64)):
            shards = np.searchsorted(first, [number], side="right") - 1
            pool = None if micro.pool is None else zero
            one = replace(micro, positions=zero, shards=shards, samples=number - first[shards], repeats=1, pool=pool)
            made = assemble(one, self.images, self.augment, self.seed)
            if not made.weights[0]:
                continue
            with suppress(Fault), generators_kept():
                self._kinds[views] = Kinds(*self._made(made, one, 0, defaultdict(float)))
                return self._kinds[views]
        raise InputError(
            f"data.stages: of {TRIED:,} samples spread over {self.images.manifest.root}, or all of them, each was "
            "dropped or could not be read; pack a set of those that are wanted"
        )

    def _made(
        self, batch: Batch, micro: "Micro", slot: int, spent: dict[str, float]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """The sample after all stages, and which of them gave a value last. Raises Fault where it must not count."""
        place = int(micro.shards[slot]), int(micro.samples[slot])
        began = perf_counter()
        try:
            members = self.extras.read(*place)
        finally:
            spent[READ] += perf_counter() - began
        views = [view[slot].clone() for view in batch.views]  # else a stage that swaps two would lose one
        sample = {"__key__": batch.keys[slot], "views": views, "label": int(batch.labels[slot]), **members}
        makers: dict[str, str] = {}
        key, began = self._key(micro, slot), perf_counter()
        for number, (name, stage) in enumerate(self.stages):
            seed_sample(*key, KEYED + number)
            before = dict(sample)
            sample = _passed(name, stage, sample)
            if DROP in sample:
                raise Fault(f"{name} dropped it: {sample[DROP]}", DROPPED)
            makers |= {each: name for each, value in sample.items() if before.get(each) is not value}
        spent[AUGMENT] += perf_counter() - began
        return sample, makers

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
