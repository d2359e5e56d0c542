"""Ablations, with a launcher that writes what a finetune run leaves behind instead of training."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from launch import __main__ as command_line
from launch import ablate, series
from launch.ablate.parts import choose, known_parts
from launch.ablate.plan import ADD_ONE, LEAVE_ONE_OUT, Plan
from launch.ablate.report import as_json, report
from launch.launcher import Local
from penstock.errors import DONE, STOPPED, InputError
from penstock.recipe import load
from penstock.tracking import Tracker
from penstock.tracking.journal import read_lines, read_run

RECIPE = """
name: tiny
seed: 5
mix: {mixup: 0.8, cutmix: 1.0}
loss: {smoothing: 0.1}
augment: {size: {name: linear, start: 16, end: 32}}
tracking: {enabled: false}
"""
# In per cent of the images: what a part adds to a run that has it, with no part at 60.
GAINS = {"mix.mixup": 12.0, "mix.cutmix": 0.0, "loss.smoothing": 4.0}
IMAGES = 600


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


class Fake:
    """A launcher under which every run writes a journal and predictions at once."""

    def __init__(self, before: Callable[[dict], int] = lambda recipe: DONE, images: int = IMAGES):
        self.before, self.images, self.ran, self.stopped = before, images, list[str](), False

    def run(self, stage: str, arguments: Sequence[str], log: Path) -> int:
        values = load(arguments[0], list(arguments[1:])).values
        self.ran.append(values["name"])
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("first words\nlast words\n")
        code = self.before(values)
        folder = Path(values["out"]) / values["name"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        config = Tracker.Config(**values["tracking"])
        tracker = Tracker(config, folder, values["name"], values, {"data.validation.digest": "d"}, active=True)
        tracker.log(1, {"perf/images_per_second": 90.0 if values["mix"]["mixup"] else 100.0})
        if code == DONE:
            self.predict(folder, values)
        tracker.close("FINISHED" if code == DONE else "KILLED")
        return code

    def predict(self, folder: Path, values: dict) -> None:
        on = [key for key in GAINS if values[key.split(".")[0]][key.split(".")[1]]]
        ease = np.random.default_rng(0).permutation(self.images) / self.images  # the same images for every run
        luck = np.random.default_rng([values["seed"], len(on)]).normal(0, 0.02, self.images)
        right = ease + luck < (60 + sum(GAINS[key] for key in on)) / 100
        labels = np.arange(self.images) % 3
        logits = np.zeros((self.images, 3), np.float32)
        logits[np.arange(self.images), np.where(right, labels, (labels + 1) % 3)] = 2
        positions = np.arange(self.images)
        np.savez(folder / "predictions.npz", positions=positions, labels=labels, logits=logits)

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def run(monkeypatch, recipe, tmp_path):
    """`run(launcher, words...)` is the command; the fake resolves recipes by merging alone."""

    def resolve(path: str, variants: list[list[str]]) -> list[dict | str]:
        return [load(path, each).values for each in variants]

    monkeypatch.setattr(series, "resolve", resolve)
    monkeypatch.setattr("penstock.tracking.origin", dict)  # asking git takes its time for each of many runs
    before = {number: signal.getsignal(number) for number in series.SIGNALS}

    def call(launcher: Fake, *words: str) -> int:
        monkeypatch.setattr(ablate, "Local", lambda procs, threads: launcher)
        monkeypatch.setattr(sys, "argv", ["launch", "ablate", str(recipe), *words, f"out={tmp_path / 'runs'}"])
        return command_line.main()

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


def values(recipe: Path) -> dict:
    return load(recipe).values


def test_parts_are_known_or_given(recipe):
    parts = choose(["mixup,resizing", "rate:optim.lr=[1,2],optim.warmup=0,rest:a=1"], values(recipe))
    assert [part.name for part in parts] == ["mixup", "resizing", "rate", "rest"]
    assert [dict(part.off) for part in parts] == [
        {"mix.mixup": "0"},
        {"augment.size": "32"},  # where the curve ends
        {"optim.lr": "[1,2]", "optim.warmup": "0"},
        {"a": "1"},
    ]


@pytest.mark.parametrize(
    "words,says",
    [
        (["mixpu"], "no part is called 'mixpu'; did you mean 'mixup'?"),
        (["mixup,mixup"], "mixup twice"),
        (["mine:key"], "write name:key=value"),
        ([], "names no part"),
    ],
)
def test_other_words_are_refused(recipe, words, says):
    with pytest.raises(InputError, match=says):
        choose(words, values(recipe))


def test_every_known_part_is_written_down_whole():
    for name, entry in known_parts().items():
        assert set(entry) == {"what", "without", "example"}, name
        for key in entry["without"]:
            assert key in entry["example"] or len(entry["without"]) > 1, name


def test_variants_with_the_same_parts_off_are_one_run(recipe):
    three = Plan.of("r", [], choose(["mixup,cutmix,erase"], {}), range(2))
    assert len(three.variants) == 2 * 3 + 2
    assert [trial.seed for trial in three.trials()] == [0] * 8 + [1] * 8  # a seed is whole before the next begins
    two = Plan.of("r", [], choose(["mixup,cutmix"], {}), range(1))
    assert list(two.variants) == ["full", "without-mixup", "without-cutmix", "none"]
    assert [(c.part, c.kind, c.on, c.off) for c in two.contrasts] == [
        ("mixup", LEAVE_ONE_OUT, "full", "without-mixup"),
        ("cutmix", LEAVE_ONE_OUT, "full", "without-cutmix"),
        ("mixup", ADD_ONE, "without-cutmix", "none"),
        ("cutmix", ADD_ONE, "without-mixup", "none"),
    ]
    assert list(Plan.of("r", [], choose(["mixup"], {}), [0]).variants) == ["full", "without-mixup"]


def test_a_part_wins_over_the_command_line(recipe):
    plan = Plan.of(
        str(recipe), ["mix.mixup=0.4", "augment.size.end=64"], choose(["mixup,resizing"], values(recipe)), [0]
    )
    found = load(recipe, plan.values(["mixup", "resizing"])).values
    assert found["mix"] == {"mixup": 0, "cutmix": 1.0}
    assert found["augment"]["size"] == 32


def test_effects_are_found_and_kept(run, tmp_path, capsys):
    fake = Fake()
    assert run(fake, "--over", "mixup,cutmix,label_smoothing", "--seeds", "3") == DONE
    assert len(fake.ran) == len(set(fake.ran)) == 8 * 3
    assert fake.ran[:2] == ["full-seed5", "without-mixup-seed5"]
    folder = tmp_path / "runs" / "tiny-ablation"
    made = report(folder)
    for kind in (LEAVE_ONE_OUT, ADD_ONE):
        mixup, cutmix = made.find("mixup", kind), made.find("cutmix", kind)
        assert mixup.effects["top1"].low < 12 < mixup.effects["top1"].high
        assert mixup.effects["top1"].sure and not cutmix.effects["top1"].sure
        assert mixup.effects["ece"].value < -5  # as sure as before, and more often right
        assert mixup.time_per_image == pytest.approx(100 * (100 / 90 - 1))
        gained, lost = mixup.flips
        assert 100 * (gained - lost) / IMAGES / 3 == pytest.approx(mixup.effects["top1"].value)
    assert made.parts() == ["mixup", "label_smoothing", "cutmix"]
    shown = capsys.readouterr().out
    assert "run 1 of 24: full-seed5" in shown and "+12." in shown and "about" in shown
    kept = json.loads((folder / "report.json").read_text())
    assert kept == json.loads(json.dumps(as_json(made)))
    assert (folder / "effects.png").stat().st_size > 10_000


def test_the_runs_are_children_of_the_ablations_own(run, tmp_path):
    assert run(Fake(), "--over", "mixup", "--seeds", "1") == DONE
    folder = tmp_path / "runs" / "tiny-ablation"
    attempts = [line["attempt"] for line in read_lines(folder / "journal.jsonl") if "attempt" in line]
    child = next(read_lines(folder / "full-seed5" / "journal.jsonl"))["attempt"]
    assert child["tags"]["parent"] == attempts[0]["id"]
    assert child["uri"] == f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    own = read_run(folder)
    assert own.status == "FINISHED"
    assert own.last("leave_one_out/mixup/top1_value") == report(folder).findings[0].effects["top1"].value


def test_it_goes_on_after_an_interruption(run, tmp_path, capsys):
    words = ("--over", "mixup,cutmix,label_smoothing", "--seeds", "2")
    first = Fake(lambda values: STOPPED if values["name"] == "without-cutmix-seed5" else DONE)
    assert run(first, *words) == STOPPED
    assert len(first.ran) == 3
    assert read_run(tmp_path / "runs" / "tiny-ablation").status == "KILLED"
    capsys.readouterr()
    assert run(Fake(), *words, "--report") == DONE
    assert "2 of 16 runs" in capsys.readouterr().out
    second = Fake()
    assert run(second, *words) == DONE
    assert second.ran == ["without-cutmix-seed5", *second.ran[1:]] and len(second.ran) == 14
    assert run(third := Fake(), *words) == DONE
    assert not third.ran
    more = Fake()  # another seed needs only its own runs
    assert run(more, "--over", "mixup,cutmix,label_smoothing", "--seeds", "3") == DONE
    assert len(more.ran) == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_it_resumably(run, number):
    def hear(values: dict) -> int:
        signal.raise_signal(number)
        return DONE

    fake = Fake(hear)
    assert run(fake, "--over", "mixup", "--seeds", "3") == STOPPED
    assert fake.stopped and len(fake.ran) == 1


def test_a_run_that_fails_does_not_end_the_others(run, tmp_path, capsys):
    fake = Fake(lambda values: 3 if values["name"] == "without-cutmix-seed6" else DONE)
    assert run(fake, "--over", "mixup,cutmix", "--seeds", "2") == series.SOME_FAILED
    assert len(fake.ran) == 8
    shown = capsys.readouterr().out
    assert "failed: without-cutmix-seed6: exit code 3" in shown and "last words" in shown
    made = report(tmp_path / "runs" / "tiny-ablation")
    assert made.find("mixup", LEAVE_ONE_OUT).seeds == [5, 6]
    assert made.find("cutmix", LEAVE_ONE_OUT).seeds == [5]
    again = Fake()
    assert run(again, "--over", "mixup,cutmix", "--seeds", "2") == DONE
    assert again.ran == ["without-cutmix-seed6"]


def test_another_recipe_is_refused(run, recipe, capsys):
    assert run(Fake(), "--over", "mixup", "--seeds", "1") == DONE
    recipe.write_text(RECIPE.replace("cutmix: 1.0", "cutmix: 0.5"))
    assert run(fake := Fake(), "--over", "mixup", "--seeds", "1") == 2
    said = capsys.readouterr().err
    assert "mix.cutmix: 1.0 there, 0.5 now" in said and "name=" in said
    assert not fake.ran


def test_runs_on_other_images_are_refused(run, capsys):
    assert run(Fake(), "--over", "mixup", "--seeds", "1") == DONE
    assert run(Fake(images=300), "--over", "mixup", "--seeds", "2") == 2
    assert "different validation images (600 and 300" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words,says",
    [
        (
            ["--over", "mixup", "mix.mixup=0"],
            "has it off already (mix.mixup=0); to have it on, write for example mix.m",
        ),
        (["--over", "mixing,mixup"], "mixup changes nothing where the other parts are off"),
        (["--over", "mixup", "--sedes", "2"], "what is '--sedes'?"),
        (["--over", "mixup", "--seeds", "0"], "--seeds is at least 1"),
        (["--report", "name=other"], "holds no ablation yet"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_run(run, capsys, words, says):
    fake = Fake()
    assert run(fake, *words) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not fake.ran


def test_the_local_launcher_hands_on_a_stop(tmp_path, monkeypatch):
    """A child that ends with 75 when it is asked to, as a stage does."""
    patient = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('on', flush=True)"
    script = tmp_path / "launch" / "__main__.py"
    script.parent.mkdir()
    script.write_text(f"{patient}; time.sleep(60)")
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "logs" / "one.log"
    launcher = Local(procs=2)
    started = subprocess.Popen

    def start(*args, **kwargs):
        child = started(*args, **kwargs)
        until = time.monotonic() + 20
        while "on" not in log.read_text() and time.monotonic() < until:
            time.sleep(0.02)
        launcher.stop()
        return child

    monkeypatch.setattr(subprocess, "Popen", start)
    assert launcher.run("finetune", ["recipe.yaml"], log) == STOPPED
