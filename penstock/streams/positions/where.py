"""Which samples a step of a run serves: by the recipe alone, whether the run was made, is going on, or is to come."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from penstock.augment import AUGMENTATIONS
from penstock.augment._views import Shown, size_multiple
from penstock.errors import InputError
from penstock.recipe import check, load
from penstock.schedule import Clock
from penstock.streams.data import Data
from penstock.streams.loader import POOL, Micro
from penstock.streams.positions.attempts import Attempt, attempts_until
from penstock.streams.positions.ledger import served_at, world_at
from penstock.streams.positions.mixture import set_of
from penstock.streams.train import TrainStream

RECIPE = "recipe.yaml"
UNUSED = ("val", "cache", "stages", "extra")  # of `data`


class Stepped(Shown):
    """The part of any stage's recipe that decides which samples a step serves."""

    accumulation: int = Field(1, ge=1)


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
    ledger = run / "ledger" if run and (run / "ledger").is_dir() else None
    attempts = attempts_until(run, step) if run else []
    made_by = (ledger and world_at(ledger, step)) or (attempts[-1].world if attempts else 1)
    world = world or made_by
    if rank is not None and not 0 <= rank < world:
        raise InputError(f"--rank {rank}: there are {world} ranks, numbered from 0; --world N says otherwise")
    ranks = range(world) if rank is None else [rank]
    served = served_at(ledger, step) if ledger and world == made_by and not overrides else {}
    if served:
        stream = _stream(recipe.model_copy(update={"accumulation": 1}), 1)
        micros = {number: [stream.micro(np.array(part), {}, step) for part in served[number]] for number in ranks}
    else:
        stream, micros = _planned(recipe, [] if overrides else attempts, step, world, ranks)
    for part in range(len(micros[ranks[0]])):
        for number in ranks:
            yield from _slots(stream, micros[number][part], part, number)


def _planned(
    recipe: Stepped, attempts: list[Attempt], step: int, world: int, ranks: Sequence[int]
) -> tuple[TrainStream, dict[int, list[Micro]]]:
    """Micro-batches of a step by rank, by the recipes of the attempts."""
    stream = _stream(_of_attempt(recipe, attempts[-1], step) if attempts else recipe, world)
    begin = _begin(recipe, attempts, step)
    if begin >= stream.clock.samples:
        raise InputError(
            f"--step {step} is after the end of the run, which has {stream.clock.samples:,} samples in steps of "
            f"{stream.batch:,}; steps count from 0"
        )
    micros = {}
    for number in ranks:
        stream.rank = number
        micros[number] = [stream.micro_at(begin, step, part) for part in range(stream.accumulation)]
    return stream, micros


def _begin(recipe: Stepped, attempts: list[Attempt], step: int) -> int:
    """Samples served before a step: on from the last position that the attempt which does it is known to have had."""
    known = {0: 0}
    if attempts:
        *before, last = attempts
        recipe = _of_attempt(recipe, last, step)
        known = {done: samples for done, samples in last.known.items() if last.since <= done <= step}
        if last.since not in known:
            known[last.since] = _begin(recipe, before, last.since) if before else 0
    done, begin = max(known.items())
    stream = _stream(recipe.model_copy(update={"accumulation": 1}), 1)
    while done < step:
        ahead = step - done if recipe.batch_growth == 1 else 1
        begin, done = begin + ahead * stream.batch_at(begin), done + ahead
    return begin


def _of_attempt(recipe: Stepped, attempt: Attempt, step: int) -> Stepped:
    """The run's newest recipe with an attempt's own batches."""
    try:
        own = {"batch": int(attempt.params["batch"]), "accumulation": int(attempt.params["engine.accumulation"])}
    except KeyError as error:
        raise InputError(f"--step {step}: the journal does not tell {error} of the attempt that did it") from None
    if attempt.grew_else:
        raise InputError(
            f"--step {step}: the run went on with other sizes of views or batches after this step; "
            "only a ledger could tell its samples (data.ledger=true)"
        )
    return recipe.model_copy(update={**own, "batch_growth": float(attempt.params.get("batch_growth", 1))})


def _recipe(path: Path, overrides: list[str]) -> Stepped:
    source = load(path, overrides)
    engine, data = source.values.get("engine") or {}, source.values.get("data")
    source.values = {key: value for key, value in source.values.items() if key in Shown.model_fields}
    source.values["accumulation"] = engine.get("accumulation", 1) if isinstance(engine, dict) else 1
    if isinstance(data, dict):  # what decides no sample is not looked at: stages would import code of the user
        source.values["data"] = {key: value for key, value in data.items() if key not in UNUSED} | {"workers": 0}
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
