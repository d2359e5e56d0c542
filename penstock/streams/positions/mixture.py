"""Several packed sets as one: each by its name, with classes in one list and one numbering of all shards.

Set s has the shards first[s] to first[s] + n[s] - 1 of the whole, called NAME/shard-000000.tar, and its samples have
the keys NAME/key. Sets are taken in the order of their names, so their order in a recipe means nothing.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Discriminator, Field, Tag, field_validator

from penstock.recipe import Block
from penstock.schedule import Knob, bounds
from penstock.streams.positions.mixture_classes import names_of, union_of
from penstock.streams.positions.part import LabelShare, Part
from penstock.streams.reader import Record, ShardReader
from penstock.streams.sets.manifest import Manifest
from penstock.streams.sets.storage import Address


class MixedSet(Block):
    """One set of a mixture."""

    set: Address = Field(description="folder or address of the packed set")
    weight: Knob | Literal["size"] = Field(
        1.0, description="its share beside the others' weights; may follow a curve; size: its number of samples"
    )
    classes: dict[str, str | None] | str | None = Field(
        None,
        description="its classes in the mixture: null goes by name, none leaves them all without label, a map gives "
        "each a name or null, or names a YAML file with such a map",
    )
    labels: LabelShare | None = Field(
        None, description="train on a fixed share of it, as data.labels, which it replaces"
    )

    @field_validator("weight")
    @classmethod
    def _positive(cls, weight: Any) -> Any:
        values = [1.0] if weight == "size" else bounds(weight)
        if min(values) < 0 or max(values) <= 0:
            raise ValueError("a weight is above 0, though a curve may touch 0; leave a set out with null in its place")
        return weight

    @field_validator("classes", mode="before")
    @classmethod
    def _numbers_are_names(cls, classes: Any) -> Any:
        return {str(theirs): ours for theirs, ours in classes.items()} if isinstance(classes, dict) else classes


Sets = dict[str, MixedSet | None]  # null leaves out a set of a recipe that is extended
Train = Annotated[
    Annotated[Address, Tag("address")] | Annotated[Sets, Tag("sets")],
    Discriminator(lambda train: "sets" if isinstance(train, Mapping) else "address"),
]


def check_sets(sets: Mapping[str, MixedSet | None]) -> None:
    """Raise ValueError unless the names can be those of sets, and there is one."""
    for name in sets:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "name":
            raise ValueError(f"{name!r} cannot be the name of a set; take letters, digits, - and _, and not `name`")
    if not any(sets.values()):
        raise ValueError("a mixture needs a set, such as photos: {set: data/photos}")


def places_of(key: str, train: Any) -> Iterator[tuple[str, str]]:
    """(key of the recipe, address) of each set of `data.train`."""
    if not isinstance(train, Mapping):
        yield key, train
        return
    yield from ((f"{key}.{name}.set", each.set) for name, each in train.items() if each is not None)


@dataclass(frozen=True)
class NamedSet:
    """A set of a mixture, opened."""

    name: str
    manifest: Manifest
    options: MixedSet
    renumbered: tuple[int, ...]  # the mixture's label for each of its own; -1 for none

    def labels(self, own: np.ndarray) -> np.ndarray:
        """The mixture's labels, like `own`."""
        return np.where(own < 0, -1, np.array([*self.renumbered, -1])[own]).astype(own.dtype)


@dataclass(frozen=True)
class Joined(Manifest):
    """The manifest of a mixture."""

    sets: tuple[NamedSet, ...] = ()

    @classmethod
    def of(cls, options: Mapping[str, MixedSet], manifests: Mapping[str, Manifest]) -> "Joined":
        """Raises InputError where classes do not fit together."""
        named = {name: names_of(name, options[name], manifests[name]) for name in sorted(options)}
        classes = union_of(named, options, manifests)
        numbers = {name: number for number, name in enumerate(classes or ())}
        sets = []
        for name, names in named.items():
            labels = range(len(names)) if classes is None else [numbers.get(n, -1) if n else -1 for n in names]
            sets.append(NamedSet(name, manifests[name], options[name], tuple(labels)))
        counts: Counter[int] = Counter()
        for each in sets:
            for label, count in each.manifest.class_counts.items():
                counts[each.renumbered[label]] += count
        counts.pop(-1, None)
        return cls(
            shards=tuple(
                replace(shard, name=f"{each.name}/{shard.name}", index=f"{each.name}/{shard.index}")
                for each in sets
                for shard in each.manifest.shards
            ),
            samples=sum(each.manifest.samples for each in sets),
            classes=classes,
            class_counts=dict(sorted(counts.items())),
            digest_of_ids=sum(each.manifest.digest_of_ids for each in sets) % (1 << 64),
            sets=tuple(sets),
        )

    @property
    def root(self) -> Any:
        """Where its sets lie, for people."""
        return ", ".join(f"{each.name} ({each.manifest.root})" for each in self.sets)

    @cached_property
    def identity(self) -> str:
        """SHA-256 in hexadecimal of all that defines the data, weights aside."""
        known = {each.name: [each.manifest.identity, each.renumbered] for each in self.sets}
        return hashlib.sha256(json.dumps([self.classes, known], sort_keys=True).encode()).hexdigest()

    @cached_property
    def first(self) -> np.ndarray:
        """Number of the first shard of each set."""
        return np.cumsum([0, *(len(each.manifest.shards) for each in self.sets)])[:-1]

    def check_files(self) -> None:
        for each in self.sets:
            each.manifest.check_files()


class JoinedReader:
    """A `ShardReader` of a mixture: shards by their numbers in the whole, labels and keys as the mixture has them."""

    def __init__(self, manifest: Joined):
        self.manifest = manifest
        self.readers = [ShardReader(each.manifest) for each in manifest.sets]

    @property
    def counters(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for reader in self.readers:
            total.update(reader.counters)
        return dict(total)

    def record(self, shard: int, sample: int) -> Record:
        number, within = self._place(shard)
        record, each = self.readers[number].record(within, sample), self.manifest.sets[number]
        label = each.renumbered[record.label] if record.label >= 0 else -1
        return replace(record, key=f"{each.name}/{record.key}", label=label)

    def row(self, shard: int, sample: int) -> np.void:
        number, within = self._place(shard)
        return self.readers[number].row(within, sample)

    def names(self, shard: int) -> tuple[str, ...]:
        number, within = self._place(shard)
        return self.readers[number].names(within)

    def column(self, shard: int, name: str) -> np.ndarray:
        number, within = self._place(shard)
        values = self.readers[number].column(within, name)
        return self.manifest.sets[number].labels(values) if name == "label" else values

    def fetch_by(self, block: int) -> None:
        for reader in self.readers:
            reader.fetch_by(block)

    def prepare(self, places: Iterable[tuple[int, int]]) -> None:
        by_set: dict[int, list[tuple[int, int]]] = {}
        for shard, sample in places:
            if shard >= 0:
                number, within = self._place(shard)
                by_set.setdefault(number, []).append((within, sample))
        for number, mine in by_set.items():
            self.readers[number].prepare(mine)

    def payload(self, shard: int, record: Record) -> bytes:
        number, within = self._place(shard)
        return self.readers[number].payload(within, record)

    def read(self, shard: int, sample: int) -> tuple[bytes, int, str, int]:
        record = self.record(shard, sample)
        return self.payload(shard, record), record.label, record.key, record.id

    def close(self) -> None:
        for reader in self.readers:
            reader.close()

    def _place(self, shard: int) -> tuple[int, int]:
        number = int(np.searchsorted(self.manifest.first, shard, side="right")) - 1
        return number, shard - int(self.manifest.first[number])


class JoinedPart:
    """The samples of a mixture that a run trains on; `Part` says it of one set."""

    def __init__(self, reader: JoinedReader, labels: str | None, seed: int, repeats: int):
        sets = reader.manifest.sets
        self.parts = [
            Part(one, own, seed, repeats, f"data.train.{each.name}.labels")
            if (own := each.options.labels)
            else Part(one, labels, seed, repeats)
            for one, each in zip(reader.readers, sets, strict=True)
        ]
        self.repeats, self.samples = repeats, sum(part.samples for part in self.parts)
        self.round = self.samples * repeats  # positions in an epoch of the mixture
        self.chosen: np.ndarray | None = None
        if any(part.chosen is not None for part in self.parts):
            first = np.cumsum([0, *(each.manifest.samples for each in sets)])
            numbers = [
                np.arange(each.manifest.samples) if part.chosen is None else part.chosen
                for part, each in zip(self.parts, sets, strict=True)
            ]
            self.chosen = np.concatenate([f + mine for f, mine in zip(first, numbers, strict=False)])


def open_sets(train: Any, **how: Any) -> Manifest:
    """The manifest of what `data.train` names: an address, or sets by their names.

    Args:
        how: handed on to `Manifest.load`.
    """
    if not isinstance(train, Mapping):
        return Manifest.load(train, **how)
    options = {name: each for name, each in train.items() if each is not None}
    return Joined.of(options, {name: Manifest.load(each.set, **how) for name, each in options.items()})


def set_of(manifest: Manifest, shard: int) -> str:
    """For people, the set that has a shard: its name in a mixture, or where it lies."""
    if not isinstance(manifest, Joined):
        return str(manifest.root)
    return manifest.sets[int(np.searchsorted(manifest.first, shard, side="right")) - 1].name


def open_reader(manifest: Manifest) -> Any:
    """A `ShardReader` of the set, or its like of a mixture."""
    return JoinedReader(manifest) if isinstance(manifest, Joined) else ShardReader(manifest)


def open_part(reader: Any, labels: str | None, seed: int, repeats: int) -> Any:
    """The `Part` of the set, or its like of a mixture."""
    return (JoinedPart if isinstance(reader, JoinedReader) else Part)(reader, labels, seed, repeats)


def labelled(manifest: Manifest) -> np.ndarray | None:
    """Numbers of a mixture's samples that have a label, where some have none; None for all."""
    if not isinstance(manifest, Joined) or manifest.unlabelled in (0, manifest.samples):
        return None
    reader, found, first = JoinedReader(manifest), [], 0
    for number, shard in enumerate(manifest.shards):
        found.append(first + np.flatnonzero(reader.column(number, "label") >= 0))
        first += shard.samples
    return np.concatenate(found)
