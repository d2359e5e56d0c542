"""Digest, ledger and faults in one process; `tests/distributed/test_stream_ranks.py` has them over ranks."""

import json
from itertools import islice

import pytest
import torch

from penstock.errors import InputError
from penstock.streams.batch import Batch
from penstock.streams.faults import FaultLog
from penstock.streams.positions.digest import EpochDigest
from penstock.streams.positions.ledger import Ledger, read_ledger
from penstock.streams.positions.part import Part
from penstock.streams.reader import ShardReader
from penstock.streams.sets.manifest import Manifest
from tests.shards import damage, write_set
from tests.unit.test_train_stream import stream


def batch(step: int, *positions: int, faults: int = 0) -> Batch:
    return Batch(
        views=[],
        labels=torch.zeros(len(positions)),
        weights=torch.ones(len(positions)),
        positions=torch.tensor(positions),
        keys=[f"key{position}" for position in positions],
        step=step,
        faults=[
            {"position": p, "shard": "s.tar", "key": f"key{p}", "kind": "changed", "reason": "broken"}
            for p in positions[:faults]
        ],
    )


def part(manifest: Manifest) -> Part:
    return Part(ShardReader(manifest))


def consume(manifest, digest: EpochDigest, since: int, steps: int, size: int = 10) -> list[int]:
    checked = []
    for number, each in enumerate(islice(stream(manifest.root, batch=size).batches(since), steps)):
        digest.add(each)
        checked += digest.check(since + (number + 1) * size)
    return checked


def test_the_digest_holds_over_epochs_resumes_and_damaged_samples(tmp_path):
    manifest = write_set(tmp_path, [13, 20])  # 33: batches of 10 straddle epochs
    damage(manifest, 5)
    digest = EpochDigest(part(manifest))
    assert consume(manifest, digest, 0, 4) == [0]
    saved = json.loads(json.dumps(digest.state()))
    resumed = EpochDigest(part(manifest))
    resumed.load(saved)
    assert consume(manifest, resumed, 40, 6) == [1, 2]


@pytest.mark.parametrize("wrong", ["lost", "doubled", "exchanged"])
def test_the_digest_notices(tmp_path, wrong):
    manifest = write_set(tmp_path, [30])
    batches = list(islice(stream(manifest.root, batch=10).batches(0), 3))
    digest = EpochDigest(part(manifest))
    for number, each in enumerate(batches):
        if wrong == "lost" and number == 1:
            each.ids[3] = 0
        if wrong == "exchanged" and number == 2:
            each.ids[0] = batches[0].ids[0]
        digest.add(each)
    if wrong == "doubled":
        digest.add(batches[0])
    with pytest.raises(InputError, match=r"epoch 0 did not serve every sample .* exactly once"):
        digest.check(30)


def test_a_digest_without_history_does_not_judge_the_epoch_it_entered(tmp_path):
    manifest = write_set(tmp_path, [33])
    assert consume(manifest, EpochDigest(part(manifest), since=20), 20, 8) == [1, 2]


def test_the_ledger_keeps_the_last_attempt_of_each_step(tmp_path):
    first = Ledger(tmp_path, since_step=0)
    for step in range(5):
        first.append([batch(step, step * 2), batch(step, step * 2 + 1)])
    first.close()
    second = Ledger(tmp_path, since_step=2)  # the checkpoint of step 2; steps 2, 3, 4 are done again
    second.append([batch(2, 4, 5)])
    second.append([batch(3, 6, 7)])
    second.close()
    third = Ledger(tmp_path, since_step=3)  # killed before a checkpoint
    third.append([batch(3, 60, 70)])
    third.close()
    ledger = read_ledger(tmp_path)
    assert {step: [record["positions"] for record in records] for step, records in ledger.items()} == {
        0: [[0], [1]],
        1: [[2], [3]],
        2: [[4, 5]],
        3: [[60, 70]],
    }
    assert ledger[3][0] == {"step": 3, "rank": 0, "positions": [60, 70], "keys": ["key60", "key70"], "weights": [1, 1]}


def test_a_line_cut_by_a_crash_is_dropped_and_damage_is_not(tmp_path):
    ledger = Ledger(tmp_path, since_step=0)
    ledger.append([batch(0, 0)])
    ledger.append([batch(1, 1)])
    ledger.close()
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    for cut in range(len(whole) + 1):
        path.write_text(whole[:cut])
        assert list(read_ledger(tmp_path)) == list(range(max(0, whole[:cut].count("\n") - 1)))
    path.write_text(whole.replace('"step": 0', '"step": '))
    with pytest.raises(InputError, match="damaged"):
        read_ledger(tmp_path)


def test_faults_are_listed_and_few_are_allowed(tmp_path):
    log = FaultLog(tmp_path, max_bad=0.01)
    for step in range(9):  # nine of ninety are ten per cent, but fewer than ten
        log.add(batch(step, *range(step * 10, step * 10 + 10), faults=1))
        assert log.check() == step + 1
    lines = [json.loads(line) for line in (tmp_path / "faults-rank-00000.jsonl").read_text().splitlines()]
    assert [line["position"] for line in lines] == list(range(0, 90, 10))
    log.add(batch(9, *range(90, 100), faults=1))
    with pytest.raises(InputError, match=r"10 of the last 100 samples cannot be read(.|\n)*s.tar: key90: broken"):
        log.check()


def test_the_rate_is_of_the_last_samples_only(tmp_path, monkeypatch):
    monkeypatch.setattr("penstock.streams.faults.WINDOW", 100)
    log = FaultLog(tmp_path, max_bad=0.2)
    for step in range(40):  # one bad in ten
        log.add(batch(step, *range(10), faults=1))
        log.check()
    with pytest.raises(InputError, match=r"of the last 1[01]0 samples"):
        for step in range(10):
            log.add(batch(step, *range(10), faults=4))
            log.check()


def test_max_bad_zero_still_allows_the_first_few(tmp_path):
    log = FaultLog(tmp_path, max_bad=0.0)
    log.add(batch(0, *range(1000), faults=9))
    assert log.check() == 9
