"""`penstock shards where`: what it names is what streams serve."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from penstock.cli import main
from penstock.errors import DONE, INPUT_WRONG, InputError
from penstock.streams.batch import Batch
from penstock.streams.loader import POOL
from penstock.streams.positions.ledger import Ledger
from penstock.streams.positions.where import places
from tests.shards import key_of, write_set
from tests.unit.test_augment_show import GROWING, VIT
from tests.unit.test_train_stream import stream

SIZES = [13, 0, 11, 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"), SIZES).root


def recipe(path: Path, folder: Path, **blocks: Any) -> Path:
    values = {
        "name": "run",
        "seed": 5,
        "duration": "3 epochs",
        "batch": 8,
        "data": {"train": str(folder), "val": "elsewhere", "workers": 2, "lanes": 4},
        "augment": {"name": "none", "size": 8},
        "method": {"name": "mae"},
    }
    values["data"] |= blocks.pop("data", {})
    path.write_text(yaml.safe_dump(values | blocks))
    return path


@pytest.mark.parametrize("data", [{}, {"labels": "50%", "repeats": 2}, {"pool": 3, "repeats": 2}])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 2), (4, 1)])
def test_names_what_the_streams_of_all_ranks_serve(tmp_path, folder, data, world, accumulation):
    path = recipe(tmp_path / "recipe.yaml", folder, data=data, engine={"accumulation": accumulation})
    sizes = {"batch": 8, "accumulation": accumulation, "seed": 5}
    batches = {rank: stream(folder, rank=rank, world=world, **sizes, **data).batches(0) for rank in range(world)}
    for step in range(7):
        served = {(rank, part): next(batches[rank]) for rank in range(world) for part in range(accumulation)}
        named = list(places(path, [], step, None, world))
        assert len(named) == 8
        for place in named:
            batch = served[place.rank, place.micro]
            assert (place.step, place.position) == (batch.step, int(batch.positions[place.slot]))
            assert (place.key, place.label) == (batch.keys[place.slot], int(batch.labels[place.slot]))
            assert key_of(sum(SIZES[: int(place.shard[6:12])]) + place.sample) == place.key
            (keyed,) = place.views
            if "pool" in data:
                assert keyed[0] == POOL
                assert np.uint64(keyed[1]).astype(np.int64) == int(batch.ids[place.slot])
                assert keyed[2] < 3
            else:
                assert keyed == (5, place.position, 0)
        one = list(places(path, [], step, world - 1, world))
        assert one == [place for place in named if place.rank == world - 1]


def test_batches_that_grow(tmp_path, folder):
    path = recipe(tmp_path / "recipe.yaml", folder, backbone=VIT, **GROWING)
    steps, position = [], 0
    for step in range(5):
        named = list(places(path, [], step, None, 1))
        assert [place.position for place in named] == list(range(position, position + len(named)))
        position += len(named)
        steps.append(len(named))
    assert max(steps) > 8


def journal(run: Path, *lines: dict[str, Any]) -> None:
    (run / "journal.jsonl").write_text("".join(json.dumps({"time": 0, **line}) + "\n" for line in lines))


def attempt(batch: int, world: int = 1, **params: Any) -> dict[str, Any]:
    params = {"batch": batch, "batch_growth": 1.0, "engine.accumulation": 1, **params}
    return {"attempt": {"params": {key: str(value) for key, value in params.items()}, "tags": {"world_size": world}}}


def samples(step: int, count: int) -> dict[str, Any]:
    return {"step": step, "metrics": {"progress/samples": count}}


def event(name: str, step: int, **data: Any) -> dict[str, Any]:
    return {"step": step, "event": name, "data": data}


@pytest.fixture
def run(tmp_path, folder) -> Path:
    """Begun with a batch of 16, killed after step 20, resumed at step 12 with one of 8; old points stay in it."""
    run = tmp_path / "run"
    run.mkdir()
    recipe(run / "recipe.yaml", folder, duration="20 epochs")
    lines = [attempt(16, 2), event("started", 0, samples=0, ranks_now=2)]
    lines += [samples(step, 16 * step) for step in (1, 5, 10, 15, 20)]
    lines += [attempt(8), event("resumed", 12, samples=192, ranks_now=1), samples(25, 192 + 13 * 8)]
    lines += [attempt(4)]  # it failed before its first step
    journal(run, *lines)
    return run


SERVED = {5: (80, 16), 11: (176, 16), 12: (192, 8), 16: (224, 8), 20: (256, 8), 22: (272, 8), 25: (296, 8)}


@pytest.mark.parametrize("step", SERVED)
def test_a_run_that_went_on_with_another_batch(run, step):
    found = list(places(run, [], step, None, None))
    begin, count = SERVED[step]
    assert sorted(place.position for place in found) == list(range(begin, begin + count))
    assert {place.rank for place in found} == ({0, 1} if step < 12 else {0})


def test_positions_follow_from_attempt_to_attempt(run):
    """Where the journal does not tell the position at which an attempt resumed."""
    path = run / "journal.jsonl"
    path.write_text(path.read_text().replace('"samples": 192, ', ""))
    for step, (begin, count) in SERVED.items():
        found = sorted(place.position for place in places(run, [], step, None, None))
        assert found == list(range(begin, begin + count))


def test_what_cannot_be_known_is_refused(run, folder):
    first = event("started", 0, samples=0, ranks_now=1)
    lines = [attempt(16), first, attempt(8), event("resumed", 12, samples=192, ranks_now=1)]
    del lines[0]["attempt"]["params"]["batch"]
    journal(run, *lines)
    with pytest.raises(InputError, match="--step 5: the journal does not tell 'batch'"):
        list(places(run, [], 5, None, None))
    assert min(place.position for place in places(run, [], 13, None, None)) == 200
    sizes = {"batch_growth": 3, "augment.size.end": 16}
    lines[0] = attempt(16, **sizes)
    lines[2] = attempt(8, **sizes | {"augment.size.end": 24})
    journal(run, *lines)
    with pytest.raises(InputError, match="other sizes"):
        list(places(run, [], 5, None, None))


def test_the_ledger_is_believed(run):
    first, second = (run / "ledger", 0), (run / "ledger", 12)
    for rank, ledger in enumerate((Ledger(*first), Ledger(*second))):
        for step in (12, 13):
            positions = torch.arange(8) + 1000 * rank + 8 * step
            ledger.append([Batch([], positions, positions, positions, [""] * 8, step)] * 2)
        ledger.close()
    found = list(places(run, [], 13, None, None))
    assert [place.position for place in found] == 2 * list(range(1104, 1112))
    assert [place.micro for place in found] == [0] * 8 + [1] * 8
    assert min(place.position for place in places(run, [], 14, None, None)) == 208  # not in it yet
    (path,) = (run / "ledger").glob("attempt-0001-*")
    path.write_text(path.read_text().replace('"world": 1', '"world": 2'))
    assert {place.rank for place in places(run, [], 11, None, None)} == {0, 1}


def test_nothing_of_the_user_is_run(tmp_path, folder, monkeypatch):
    (tmp_path / "ill.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(tmp_path)
    data = {"stages": ["ill:stage"], "extra": {"caption": "txt"}, "cache": "ram"}
    path = recipe(tmp_path / "recipe.yaml", folder, data=data)
    assert len(list(places(path, [], 0, None, 1))) == 8


def test_the_command(tmp_path, folder, capsys):
    path = recipe(tmp_path / "recipe.yaml", folder)
    assert main(["shards", "where", str(path), "--step", "2"]) == DONE
    shown = capsys.readouterr().out
    assert "step 2: 8 samples" in shown
    assert "shard-00000" in shown
    assert main(["shards", "where", str(path), "--step", "2", "--json"]) == DONE
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 8
    assert all(line["key"] in shown and line["class_name"].startswith("class") for line in lines)
    for words, said in [
        (["--step", "99"], "after the end of the run"),
        (["--step", "1", "--rank", "1"], "there are 1 ranks"),
        (["--step", "1", "--world", "3"], "cannot be split evenly"),
    ]:
        assert main(["shards", "where", str(path), *words]) == INPUT_WRONG
        assert said in capsys.readouterr().err
    assert main(["shards", "where", str(folder), "--step", "1"]) == INPUT_WRONG
    assert "recipe.yaml" in capsys.readouterr().err
