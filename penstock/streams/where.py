"""Which samples a step of a run serves: by the recipe alone, whether the run was made, is going on, or is to come."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from penstock.augment import AUGMENTATIONS
from penstock.augment._views import Shown, size_multiple
from penstock.errors import InputError
from penstock.recipe import check, load
from penstock.schedule import Clock
from penstock.streams.data import Data
from penstock.streams.ledger import world_at
from penstock.streams.loader import POOL, Micro
from penstock.streams.mixture import set_of
from penstock.streams.train import TrainStream
from penstock.tracking.journal import NAME, read_run

RECIPE = "recipe.yaml"


class Stepped(Shown):
    """The part of any stage's recipe that decides which samples a step serves."""

    accumulation: int = Field(1, ge=1)

    @field_validator("data")
    @classmethod
    def _alone(cls, data: Data.Config) -> Data.Config:
        return data.model_copy(update={"val": None, "cache": "none", "stages": [], "extra": {}, "workers": 0})


@dataclass(frozen=True)
class Place:
    """One slot of a step, and the sample in it."""

    step: int  # counted from 0
    micro: int  # micro-batch of the step
    rank: int
    slot: int  # in the rank's micro-batch
    position: int  # in the endless order
    epoch: int  # of the sample's own set
    set: str
    shard: str
    sample: int  # number within the shard
    key: str
    label: int
    class_name: str
    views: list[tuple[int, ...]]  # what keys the randomness of each view


def places(address: Path, overrides: list[str], step: int, rank: int | None, world: int | None) -> Iterator[Place]:
    """The slots of a step, by micro-batch, rank and slot.

    Args:
        address: a run's folder, or a recipe.
        step: optimizer steps done before it, as ledgers and lists of faults count.
        rank: only this one's.
        world: ranks; of a run that was made, as many as it had at that step, and else 1.

    Raises:
        InputError: the recipe is wrong, the step comes after the run's end, there is no such rank.
    """
    run = address if address.is_dir() else None
    if run is not None and not (run / RECIPE).is_file():
        raise InputError(f"{run} is not a run: it holds no {RECIPE}; give a run's folder, or a recipe")
    recipe = _recipe(run / RECIPE if run else address, overrides)
    world = world or (_world(run, step) if run else 1)
    if rank is not None and not 0 <= rank < world:
        raise InputError(f"--rank {rank}: there are {world} ranks, numbered from 0; --world N says otherwise")
    stream, begin = _stream(recipe, world), 0
    done, begin = _nearest(run, step) if run and not overrides else (0, 0)
    while done < step:
        ahead = step - done if recipe.batch_growth == 1 else 1
        begin, done = begin + ahead * stream.batch_at(begin), done + ahead
    if begin >= stream.clock.samples:
        raise InputError(
            f"--step {step} is after the end of the run, which has {stream.clock.samples:,} samples in steps of "
            f"{recipe.batch:,}; steps count from 0"
        )
    plans = []
    for number in range(world) if rank is None else [rank]:
        stream.rank = number
        plans.append((number, [stream.micro_at(begin, step, part) for part in range(stream.accumulation)]))
    for part in range(stream.accumulation):
        for number, micros in plans:
            yield from _slots(stream, micros[part], part, number)


def _recipe(path: Path, overrides: list[str]) -> Stepped:
    source = load(path, overrides)
    engine = source.values.get("engine") or {}
    source.values = {key: value for key, value in source.values.items() if key in Shown.model_fields}
    source.values["accumulation"] = engine.get("accumulation", 1) if isinstance(engine, dict) else 1
    return check(Stepped, source)


def _stream(recipe: Stepped, world: int) -> TrainStream:
    samples = Data(recipe.data, recipe.seed).part.samples
    return TrainStream(
        recipe.data,
        AUGMENTATIONS.get(recipe.augment.name)(recipe.augment),
        batch=recipe.batch,
        accumulation=recipe.accumulation,
        rank=0,
        world=world,
        seed=recipe.seed,
        clock=Clock.of(recipe.duration, recipe.batch, samples),
        size_multiple=size_multiple(recipe),
        growth=recipe.batch_growth,
    )


def _world(run: Path, step: int) -> int:
    """Ranks that did the step: by the ledger, or else by the newest attempt."""
    found = world_at(run / "ledger", step) if (run / "ledger").is_dir() else None
    if found is None and (run / NAME).is_file():
        found = int(read_run(run).tags.get("world_size", 1))
    return found or 1


def _nearest(run: Path, step: int) -> tuple[int, int]:
    """The last step up to this one whose position the journal knows: a run may have gone on with another batch."""
    if not (run / NAME).is_file():
        return 0, 0
    known = read_run(run).series.get("progress/samples", [])
    return max(((done, round(samples)) for done, samples in known if done <= step), default=(0, 0))


def _slots(stream: TrainStream, micro: Micro, part: int, rank: int) -> Iterator[Place]:
    epochs = stream.course.locate(micro.positions // stream.part.repeats)[2].tolist()
    for slot, (position, shard, sample) in enumerate(
        zip(micro.positions.tolist(), micro.shards.tolist(), micro.samples.tolist(), strict=True)
    ):
        record = stream.images.reader.record(shard, sample)
        key: tuple[int, ...] = (stream.seed, position)
        if micro.pool is not None:
            key = (POOL, record.id, int(micro.pool[slot]))
        yield Place(
            step=micro.step,
            micro=part,
            rank=rank,
            slot=slot,
            position=position,
            epoch=epochs[slot],
            set=set_of(stream.manifest, shard),
            shard=stream.manifest.shards[shard].name,
            sample=sample,
            key=record.key,
            label=record.label,
            class_name=stream.manifest.class_name(record.label),
            views=[(*key, view) for view in range(stream.augment.views)],
        )


def print_places(found: list[Place]) -> None:
    """A table on standard output."""
    from rich.console import Console
    from rich.table import Table

    columns: dict[str, Any] = {"micro": "micro", "rank": "rank", "position": "position", "epoch": "epoch"}
    columns |= {"shard": "shard", "sample": "number", "key": "key", "class_name": "class"}
    sets = {place.set for place in found}
    if len(sets) > 1:
        columns = {"set": "set", **columns}
    title = f"step {found[0].step}: {len(found):,} samples of {', '.join(sorted(sets))}"
    table = Table(*columns.values(), title=title, box=None, pad_edge=False)
    for place in found:
        table.add_row(*(str(getattr(place, name)) for name in columns))
    Console(width=None if Console().is_terminal else 200, markup=False).print(table)
