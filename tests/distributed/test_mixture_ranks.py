"""A mixture over ranks that read different samples, through restarts with another number of ranks."""

from itertools import islice
from pathlib import Path

import pytest

from penstock.augment.none import NoAugmentation
from penstock.errors import InputError
from penstock.schedule import Clock, Linear
from penstock.streams.data import Data
from penstock.streams.faults import FaultLog
from penstock.streams.positions.digest import digest_of
from penstock.streams.positions.ledger import Ledger, read_ledger
from penstock.streams.sets.manifest import Manifest
from penstock.streams.train import TrainStream
from tests.shards import damage, key_of, write_set

BATCH, STEPS = 12, 14
SIZES = {"a": [20, 3], "b": [9]}


def stream(root: Path, rank: int, world: int) -> TrainStream:
    curve = Linear(start=2.0, end=0.5).model_dump()
    train = {"a": {"set": root / "a", "weight": curve}, "b": {"set": root / "b"}}
    return TrainStream(
        Data.Config(train=train, workers=0, lanes=4),
        NoAugmentation(NoAugmentation.Config(size=8)),
        batch=BATCH,
        accumulation=2,
        rank=rank,
        world=world,
        seed=3,
        clock=Clock(STEPS, BATCH, 32),
    )


def consume(rank: int, world: int, root: Path, run: Path, since: int, until: int, saved=None, twice=False):
    """Steps `since` to `until` as the loop does them: epochs proved, the state after each step, and an error."""
    part = stream(root, rank, world)
    if saved:
        part.check_identity(saved["identity"])
    digest, ledger, faults = digest_of(part.course, since * BATCH), Ledger(run, since), FaultLog(run, 1.0)
    if saved:
        digest.load(saved["digest"])
    done, states, batches = [], {}, part.batches(since * BATCH)
    try:
        for step in range(since, until):
            micros = list(islice(batches, 2))
            if twice and rank == world - 1 and step == 2:
                ours, theirs = (micro.ids for micro in micros)
                assert ours is not None and theirs is not None
                ours[0] = theirs[0]
            for micro in micros:
                digest.add(micro)
                faults.add(micro)
            ledger.append(micros)
            done += [(each["set"], each["epoch"]) for each in digest.done((step + 1) * BATCH)]
            states[step + 1] = {"digest": digest.state(), "identity": part.identity}
    except InputError as error:
        return done, states, str(error)
    return done, states, None


@pytest.fixture
def root(tmp_path) -> Path:
    for name, sizes in SIZES.items():
        write_set(tmp_path / "sets" / name, sizes)
    return tmp_path / "sets"


@pytest.mark.ranks
def test_each_sets_epochs_are_proved_through_restarts(ranks, root, tmp_path):
    run = tmp_path / "run"
    first = ranks(2).run(consume, root, run, 0, 5)
    second = consume(0, 1, root, run, 3, 8, first[0][1][3])  # from the checkpoint of step 3, on one rank
    third = ranks(2).run(consume, root, run, 8, STEPS, second[1][8])
    assert all(error is None for _, _, error in (*first, second, *third))
    assert first[0] == first[1] and third[0] == third[1]
    ends = stream(root, 0, 1).course.positions(STEPS * BATCH)
    proved = [*(each for each in first[0][0] if each not in second[0]), *second[0], *third[0][0]]
    assert sorted(proved) == sorted(
        (name, epoch) for name, end in zip("ab", ends, strict=True) for epoch in range(end // sum(SIZES[name]))
    )
    served = {
        position: key
        for records in read_ledger(run).values()
        for record in records
        for position, key in zip(record["positions"], record["keys"], strict=True)
    }
    assert sorted(served) == list(range(STEPS * BATCH))
    for name, end in zip("ab", ends, strict=True):
        total = sum(SIZES[name])
        keys = [served[p].removeprefix(f"{name}/") for p in sorted(served) if served[p].startswith(f"{name}/")]
        assert len(keys) == end
        for epoch in range(end // total):
            assert sorted(keys[epoch * total : (epoch + 1) * total]) == [key_of(number) for number in range(total)]


@pytest.mark.ranks
def test_a_sample_exchanged_on_one_rank_stops_all_and_names_the_set(ranks, root, tmp_path):
    results = ranks(2).run(consume, root, tmp_path / "run", 0, STEPS, twice=True)
    errors = [error for _, _, error in results]
    assert errors[0] == errors[1] and "did not serve every sample of" in errors[0]
    assert any(str(root / name) in errors[0] for name in SIZES)


@pytest.mark.ranks
def test_what_cannot_be_read_is_listed_with_its_set(ranks, root, tmp_path):
    key = damage(Manifest.load(root / "b"), 4)
    results = ranks(2).run(consume, root, tmp_path / "run", 0, STEPS)
    assert all(error is None for _, _, error in results)  # unreadable samples count as served
    listed = "".join(path.read_text() for path in (tmp_path / "run").glob("faults-*"))
    assert f'"shard": "b/shard-000000.tar", "key": "b/{key}"' in listed
