"""Real finetuning runs: killed and resumed, with every part of the recipe switched on."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from penstock.streams.positions.ledger import read_ledger
from penstock.streams.positions.where import places
from tests.runs.runner import FINETUNE, finish, history, kill, start, wait_for_step


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    for part, split in (("train", "train"), ("test", "val")):
        command = ["-m", "penstock.cli", "shards", "pack", f"digits:{part}", str(folder / split), "--limit", "200"]
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
    path = folder / "recipe.yaml"
    path.write_text(FINETUNE.format(digits=folder))
    return path


@pytest.fixture(scope="module")
def unbroken(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    code, output = finish(start(folder, recipe, stage="finetune"))
    assert code == 0, output
    return folder / "run"


def keys_by_step(folder: Path) -> dict[int, list[str]]:
    ledger = read_ledger(folder / "ledger")
    return {step: sorted(key for record in records for key in record["keys"]) for step, records in ledger.items()}


def predictions(folder: Path) -> np.ndarray:
    with np.load(folder / "predictions.npz", allow_pickle=False) as found:
        assert found["positions"].tolist() == list(range(200))
        return found["logits"]


def test_a_run_leaves_what_people_look_for(unbroken):
    for name in ("export/model.safetensors", "export/config.json", "predictions.npz", "per_class.tsv", "recipe.yaml"):
        assert (unbroken / name).is_file(), name
    names = {name for name, _ in history(unbroken)}
    assert {"eval/top1", "eval/ece", "final/top1", "final/temperature", "train/top1_mixed"} <= names
    assert len(list(unbroken.glob("pictures/*reliability*"))) == 1


def test_where_names_what_the_ledger_holds(unbroken):
    """Of both ranks, with a share of the labels, repeats and batches that grow."""
    ledger = read_ledger(unbroken / "ledger")
    for step in (0, 1, 3, 4, 5, len(ledger) - 1):
        named = list(places(unbroken, [], step, None, None))
        for record in ledger[step]:
            mine = [place for place in named if place.rank == record["rank"]]
            assert [place.position for place in mine] == record["positions"]
            assert [place.key for place in mine] == record["keys"]
        assert len(named) == sum(len(record["keys"]) for record in ledger[step])
        assert [place for place in named if place.rank == 1] == list(places(unbroken, [], step, 1, None))


def test_the_journal_tells_what_the_data_took(unbroken):
    lines = [json.loads(line) for line in (unbroken / "journal.jsonl").read_text().splitlines()]
    reports = [line["metrics"] for line in lines if "perf/data_wait" in line.get("metrics", {})]
    assert reports
    for metrics in reports:
        assert 0 <= metrics["perf/data_wait"] <= 1
        assert metrics["perf/retries"] == 0
        assert all(0 < metrics[f"perf/{name}_ms"] < 1000 for name in ("read", "decode", "augment"))
        assert metrics["perf/read_mb_per_second"] > 0


def test_growing_batches_took_fewer_steps_for_the_same_samples(unbroken):
    keys = keys_by_step(unbroken)
    sizes = [len(keys[step]) for step in sorted(keys)]
    assert sum(sizes) == 24 * 32 and sizes == [64] * 4 + [32] * 16


def test_killed_runs_end_with_the_same_weights_metrics_and_answers(recipe, unbroken, tmp_path):
    dice, run = random.Random(5), tmp_path / "run"
    for low in (1, 9):
        process = start(tmp_path, recipe, stage="finetune")
        wait_for_step(run, dice.randint(low, low + 4), process)
        kill(process)
    code, output = finish(start(tmp_path, recipe, stage="finetune"))
    assert code == 0 and "resuming at step" in output, output
    assert history(run) == history(unbroken)
    assert keys_by_step(run) == keys_by_step(unbroken)
    assert (predictions(run) == predictions(unbroken)).all()
    weights = "export/model.safetensors"
    assert (run / weights).read_bytes() == (unbroken / weights).read_bytes()


def test_one_rank_gives_what_two_give(recipe, unbroken, tmp_path):
    """Nothing but dropout, whose draws are a rank's own, may depend on the number of ranks."""
    off = ("drop.path=0", "drop.proj=0")
    for procs in (1, 2):
        code, output = finish(start(tmp_path / str(procs), recipe, *off, stage="finetune", procs=procs))
        assert code == 0, output
    alone, pair = (tmp_path / str(procs) / "run" for procs in (1, 2))
    assert keys_by_step(alone) == keys_by_step(pair) == keys_by_step(unbroken)
    np.testing.assert_allclose(predictions(alone), predictions(pair), atol=2e-3)
    ones, twos = history(alone), history(pair)
    assert ones["train/loss", 11] == pytest.approx(twos["train/loss", 11], rel=1e-4)


def test_early_stopping_ends_a_finished_run(recipe, tmp_path):
    early = ("monitor.stop_early={metric: eval/top1, patience: 1}", "measure.every=2 steps", "optim.lr=1e-12")
    code, output = finish(start(tmp_path, recipe, *early, stage="finetune"))
    run = tmp_path / "run"
    assert code == 0, output
    assert max(keys_by_step(run)) < 19 and (run / "best" / "model.safetensors").is_file()
    assert ("final/top1", max(keys_by_step(run)) + 1) in history(run)
    code, output = finish(start(tmp_path, recipe, *early, stage="finetune"))  # it is done, and says so again
    assert code == 0, output
