"""Real runs, killed and stopped: what is resumed equals what was never interrupted."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.streams.positions.ledger import read_ledger
from tests.runs.runner import RECIPE, finish, history, kill, ranks_of, start, wait_for_step

STEPS, BATCH, SAMPLES = 24, 32, 200


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    for part, split in (("train", "train"), ("test", "val")):
        command = [
            "-m",
            "penstock.cli",
            "shards",
            "pack",
            f"digits:{part}",
            str(folder / split),
            "--limit",
            str(SAMPLES),
        ]
        subprocess.run([sys.executable, *command, "--samples-per-shard", "64"], check=True, capture_output=True)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(digits=folder))
    return path


@pytest.fixture(scope="module")
def unbroken(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    code, output = finish(start(folder, recipe))
    assert code == 0, output
    return folder / "run"


def weights(folder: Path) -> bytes:
    return (folder / "export" / "model.safetensors").read_bytes()


def keys_by_step(folder: Path) -> dict[int, list[str]]:
    ledger = read_ledger(folder / "ledger")
    return {step: sorted(key for record in records for key in record["keys"]) for step, records in ledger.items()}


def test_ledger_serves_each_sample_once_an_epoch(unbroken):
    ledger = read_ledger(unbroken / "ledger")
    positions = sorted(p for records in ledger.values() for record in records for p in record["positions"])
    assert positions == list(range(STEPS * BATCH))
    keys = {p: k for rs in ledger.values() for r in rs for p, k in zip(r["positions"], r["keys"], strict=True)}
    for epoch in range(STEPS * BATCH // SAMPLES):
        assert len({keys[p] for p in range(epoch * SAMPLES, (epoch + 1) * SAMPLES)}) == SAMPLES


@pytest.mark.parametrize("kills", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_kill_at_random_steps_changes_nothing(recipe, unbroken, tmp_path, kills):
    dice = random.Random(kills)
    run = tmp_path / "run"
    for index in range(kills):
        process = start(tmp_path, recipe)
        low = (STEPS - 4) * index // kills  # checkpoints are 5 steps apart, so some work is always lost
        wait_for_step(run, dice.randint(low + 1, low + 5), process)
        kill(process)
    code, output = finish(start(tmp_path, recipe))
    assert code == 0 and "resuming at step" in output, output
    assert weights(run) == weights(unbroken)
    assert history(run) == history(unbroken)
    assert keys_by_step(run) == keys_by_step(unbroken)


def test_stop_on_one_rank_saves_and_resumes_on_another_number_of_ranks(recipe, unbroken, tmp_path):
    run = tmp_path / "run"
    process = start(tmp_path, recipe)
    wait_for_step(run, 6, process)
    os.kill(ranks_of(process)[1], signal.SIGUSR1)
    code, output = finish(process)
    assert code == 75, output
    code, output = finish(start(tmp_path, recipe, "data.workers=2", procs=1))
    assert code == 0 and "resuming at step" in output, output
    assert keys_by_step(run) == keys_by_step(unbroken)
    mine, theirs = history(run), history(unbroken)
    assert mine["train/loss", STEPS] == pytest.approx(theirs["train/loss", STEPS], rel=1e-4)


def test_sigterm_to_the_launcher_saves_and_resumes(recipe, unbroken, tmp_path):
    process = start(tmp_path, recipe)
    wait_for_step(tmp_path / "run", 7, process)
    process.terminate()
    code, output = finish(process)
    assert code == 75 and "Traceback" not in output, output
    code, output = finish(start(tmp_path, recipe))
    assert code == 0, output
    assert weights(tmp_path / "run") == weights(unbroken)
    assert history(tmp_path / "run") == history(unbroken)


def test_no_compiler_is_needed(recipe, tmp_path):
    (tmp_path / "bin").mkdir()
    code, output = finish(start(tmp_path, recipe, "duration=2 steps", "evaluate=null", PATH=str(tmp_path / "bin")))
    assert code == 0, output


def test_images_without_labels_or_a_validation_set_give_pictures(recipe, tmp_path):
    overrides = ("duration=2 steps", "data.val=null", "evaluate=null", "monitor.pictures=100%")
    code, output = finish(start(tmp_path, recipe, *overrides))
    assert code == 0, output
    assert (tmp_path / "run/pictures/reconstruction/00000002.png").is_file()


def test_a_run_that_diverges_stops_with_the_keys_of_its_batch(recipe, tmp_path):
    code, output = finish(start(tmp_path, recipe, "optim.lr=1e30", "engine.max_skipped=3", "optim.schedule=constant"))
    assert code == 3 and "3 steps in a row" in output and "its samples: 0" in output, output
    assert "Traceback" not in output


def test_saved_recipe_runs_again_unchanged(unbroken, tmp_path):
    code, output = finish(start(tmp_path, unbroken / "recipe.yaml", procs=2))
    assert code == 0, output
    assert weights(tmp_path / "run") == weights(unbroken)


def test_finished_run_is_not_trained_again(recipe, unbroken):
    before = weights(unbroken)
    code, output = finish(start(unbroken.parent, recipe))
    assert code == 0, output
    assert weights(unbroken) == before


@pytest.mark.parametrize(
    "overrides,words",
    [
        (("batch=33",), "multiple of 2"),
        (("batch=4096",), "larger than the training set"),
        (("data.train=/nowhere",), "/nowhere"),
        (("seed=5", "checkpoint.resume=must"), "the seed differs"),
        (("backbone.options.embed_dim=32",), "another model"),
    ],
)
def test_wrong_input_exits_2_before_the_first_step(recipe, unbroken, overrides, words):
    code, output = finish(start(unbroken.parent, recipe, *overrides))
    assert code == 2 and words in output, output
    assert "Traceback" not in output
