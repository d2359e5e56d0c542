"""`penstock shards where`: what it names is what streams serve."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from penstock.cli import main
from penstock.errors import DONE, INPUT_WRONG
from penstock.streams.ledger import Ledger
from penstock.streams.loader import POOL
from penstock.streams.where import places
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


def test_a_run_knows_its_ranks_and_a_batch_that_changed(tmp_path, folder):
    run = tmp_path / "run"
    run.mkdir()
    recipe(run / "recipe.yaml", folder)
    ledger = Ledger(run / "ledger", since_step=0)
    ledger.close()
    (path,) = (run / "ledger").iterdir()
    path.write_text(path.read_text().replace('"world": 1', '"world": 2'))
    assert {place.rank for place in places(run, [], 1, None, None)} == {0, 1}
    journal = [{"time": 0, "step": 2, "metrics": {"progress/samples": 24}}]  # the first two steps had 12 samples each
    (run / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in journal))
    assert min(place.position for place in places(run, [], 3, None, None)) == 32


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
