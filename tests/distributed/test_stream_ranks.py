"""Digest, ledger and faults over ranks that read different samples, through restarts with another number of ranks."""

from itertools import islice
from pathlib import Path

import pytest

from penstock.errors import InputError
from penstock.streams.faults import FaultLog
from penstock.streams.positions.digest import EpochDigest
from penstock.streams.positions.ledger import Ledger, read_ledger
from tests.shards import damage, key_of, write_set
from tests.unit.test_train_stream import stream

TOTAL, BATCH = 33, 12


def consume(rank: int, world: int, folder: Path, run: Path, since: int, until: int, state=None, max_bad: float = 1.0):
    """Steps `since` to `until` as the loop does them; returns the epochs checked, the digest's state after each step
    as a checkpoint would hold it, and an error."""
    part = stream(folder, batch=BATCH, accumulation=2, rank=rank, world=world)
    digest, ledger, faults = EpochDigest(part.part), Ledger(run, since), FaultLog(run, max_bad)
    if state:
        digest.load(state)
    checked, states, batches = [], {}, part.batches(since * BATCH)
    try:
        for step in range(since, until):
            micros = list(islice(batches, 2))
            for micro in micros:
                assert micro.step == step
                digest.add(micro)
                faults.add(micro)
            ledger.append(micros)
            checked += digest.check((step + 1) * BATCH)
            faults.check()
            states[step + 1] = digest.state()
    except InputError as error:
        return checked, states, str(error)
    return checked, states, None


@pytest.mark.ranks
def test_ledger_and_digest_through_restarts(ranks, tmp_path):
    folder, run = write_set(tmp_path / "set", [20, 13]).root, tmp_path / "run"
    first = ranks(2).run(consume, folder, run, 0, 5)
    second = consume(0, 1, folder, run, 3, 7, first[0][1][3])  # from the checkpoint of step 3, on one rank
    third = ranks(2).run(consume, folder, run, 7, 12, second[1][7])
    assert first[0] == first[1]
    assert third[0] == third[1]
    assert [checked for checked, _, _ in (first[0], second, third[0])] == [[0], [1], [2, 3]]
    assert all(error is None for _, _, error in (*first, second, *third))
    ledger = read_ledger(run)
    assert list(ledger) == list(range(12))
    for step, records in ledger.items():
        positions = sorted(position for record in records for position in record["positions"])
        assert positions == list(range(step * BATCH, (step + 1) * BATCH))
    keys = {
        p: k for records in ledger.values() for r in records for p, k in zip(r["positions"], r["keys"], strict=True)
    }
    for epoch in range(4):
        assert sorted(keys[epoch * TOTAL + place] for place in range(TOTAL)) == [key_of(n) for n in range(TOTAL)]


@pytest.mark.ranks
def test_all_ranks_stop_on_faults_of_any(ranks, tmp_path):
    manifest = write_set(tmp_path / "set", [20, 13])
    damaged = {damage(manifest, number) for number in (2, 3, 30)}
    results = ranks(2).run(consume, manifest.root, tmp_path / "run", 0, 30, max_bad=0.0)
    errors = [error for _, _, error in results]
    assert errors[0] is not None
    assert errors[0] == errors[1]
    assert all(key in errors[0] for key in damaged)
