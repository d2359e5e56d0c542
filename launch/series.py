"""A series of runs of one recipe: each run once, gone on with after an interruption, shown under one parent run."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from launch.launcher import Launcher
from penstock.compare import duration
from penstock.errors import DONE, STOPPED, InputError
from penstock.recipe import difference
from penstock.tracking.journal import NAME, read_run

if TYPE_CHECKING:
    from launch.array import Array

STAGE = "finetune"
PREDICTIONS = "predictions.npz"
OUTSIDE = ("tracking", "out")  # blocks and keys of a recipe that change nothing in a run's result
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SOME_FAILED = 1

Resolve = Callable[[str, list[list[str]]], list[dict | str]]


@dataclass(frozen=True)
class Trial:
    """One run: a variant of the recipe with a seed."""

    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"


class Plan(Protocol):
    """Which runs there are."""

    recipe: str

    def trials(self) -> list[Trial]: ...

    def overrides_of(self, variant: str) -> list[str]:
        """What makes the recipe this variant."""
        ...


def resolve(recipe: str, variants: list[list[str]]) -> list[dict | str]:
    """The resolved recipe, or what is wrong with it, for each list of overrides; in a process that may import torch."""
    command = [sys.executable, "-m", f"{STAGE}.variants", recipe]
    done = subprocess.run(command, input=json.dumps(variants), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"{' '.join(command[1:])} ended with {done.returncode}; its own words are above")
    return json.loads(done.stdout.splitlines()[-1])


@dataclass
class Series:
    """The runs of a plan in its folder."""

    plan: Plan
    folder: Path
    recipes: Mapping[str, dict[str, Any]]  # resolved, by variant
    tracking: Sequence[str] = ()  # overrides by which the runs are shown under the series' own

    def expected(self, trial: Trial) -> dict[str, Any]:
        return {**self.recipes[trial.variant], "name": trial.name, "seed": trial.seed}

    def arguments(self, trial: Trial) -> list[str]:
        own = [f"out={self.folder}", f"name={trial.name}", f"seed={trial.seed}", *self.tracking]
        return [self.plan.recipe, *self.plan.overrides_of(trial.variant), *own]

    def refuse_changed(self) -> None:
        """Raises InputError where a run in the folder, finished or not, was another recipe's."""
        for trial in self.plan.trials():
            changed = changes(self.folder / trial.name, self.expected(trial))
            if changed:
                differing = "\n".join(f"  {key}: {was} there, {now} now" for key, (was, now) in changed.items())
                raise InputError(
                    f"{self.folder / trial.name} is a run of another recipe:\n{differing}\nGive this series another "
                    f"name (name=...), or move {self.folder} away"
                )

    def run(self, launcher: Launcher, asked: Callable[[], bool], say: Callable[[str], None]) -> tuple[int, list[str]]:
        """Every run that is not finished. STOPPED or DONE, and a line for each run that failed."""
        trials, failed = self.plan.trials(), list[str]()
        for number, trial in enumerate(trials, 1):
            if finished(self.folder / trial.name):
                continue
            if asked():
                return STOPPED, failed
            say(f"run {number} of {len(trials)}: {trial.name}{self._left(trials[number - 1 :])}")
            log, began = self.folder / "logs" / f"{trial.name}.log", time.monotonic()
            code = launcher.run(STAGE, self.arguments(trial), log)
            if code == STOPPED:
                return STOPPED, failed
            if code != DONE or not finished(self.folder / trial.name):
                why = f"exit code {code}" if code else f"it left no {PREDICTIONS}"
                failed.append(f"{trial.name}: {why} after {duration(time.monotonic() - began)}; its words: {log}")
                say(f"  {failed[-1]}\n{last_lines(log)}")
        return DONE, failed

    def left(self) -> list[Trial]:
        """The runs that are not finished."""
        return [trial for trial in self.plan.trials() if not self._done(trial)]

    def _left(self, trials: Sequence[Trial]) -> str:
        took = [read_run(self.folder / each.name).seconds for each in self.plan.trials() if self._done(each)]
        left = [trial for trial in trials if not self._done(trial)]
        return f", about {duration(sum(took) / len(took) * len(left))} left" if took else ""

    def _done(self, trial: Trial) -> bool:
        return finished(self.folder / trial.name)


def follow(
    series: Series,
    stage: str,
    params: Mapping[str, Any],
    launcher: Launcher,
    show: Callable[[Any], int],
    show_stopped: bool = True,
    array: "Array | None" = None,
) -> int:
    """Run a series under a tracked run of its own, stoppable, and show what came out.

    Args:
        stage: of the parent run.
        params: of the parent run.
        show: is given the parent's tracker, keeps the report there, and gives an exit code.
        show_stopped: whether it is called in a series that was stopped, too; it should then be quick.
        array: where the runs that are left go instead, to be shown later.

    Returns:
        The exit code: 0 done, 1 some runs failed, 75 stopped and resumable.
    """
    from penstock.tracking import Tracker

    series.refuse_changed()
    if array is not None:
        array.refuse_twice(series)
    stopping: list[int] = []

    def stop(number: int, frame: object) -> None:
        stopping.append(number)
        launcher.stop()

    for number in SIGNALS:
        signal.signal(number, stop)
    config = Tracker.Config(**next(iter(series.recipes.values()))["tracking"])
    tracker = Tracker(config, series.folder, series.folder.name, params, {"stage": stage}, active=True)
    series.tracking = [f"tracking.parent={tracker.id}", *store(config, series.folder)]
    try:
        if array is not None and series.left():
            say(array.send(series, STAGE))
            tracker.close("SCHEDULED")
            return DONE
        code, failed = series.run(launcher, lambda: bool(stopping), say)
        shown = show(tracker) if show_stopped or code != STOPPED else DONE
    except BaseException:
        tracker.close("FAILED")
        raise
    tracker.close("KILLED" if code == STOPPED else "FAILED" if failed or shown else "FINISHED")
    for line in failed:
        say(f"failed: {line}")
    if code == STOPPED:
        say("stopped; the same command goes on from here")
        return STOPPED
    return SOME_FAILED if failed else shown


def store(config: Any, folder: Path) -> list[str]:
    """The runs lie a folder deeper than the series' own journal, and go to the same MLflow store."""
    if config.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return []
    return [f"tracking.uri=sqlite:///{folder.parent.resolve() / 'mlflow.db'}"]


def say(text: str) -> None:
    print(text, flush=True)


def finished(folder: Path) -> bool:
    return (folder / NAME).is_file() and (folder / PREDICTIONS).is_file() and read_run(folder).status == "FINISHED"


def changes(folder: Path, expected: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys in which the recipe of the run in `folder` differs from the expected one, where there is a run."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return {}
    found = difference(yaml.safe_load(path.read_text(encoding="utf-8")), expected)
    return {key: values for key, values in found.items() if key.partition(".")[0] not in OUTSIDE}


def last_lines(log: Path, count: int = 8) -> str:
    if not log.is_file():
        return ""
    return "\n".join(f"    {line}" for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


def values_given(args: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """key=value of the command line, also those behind options. Raises InputError for any other word."""
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown:
        raise InputError(f"what is {unknown[0]!r}? Options are in --help; values of the recipe are key=value")
    return [*args.overrides, *rest]


def beneath(key: str, others: Iterable[str]) -> bool:
    """Whether a dotted key is one of others, or inside one."""
    return any(key == other or key.startswith(f"{other}.") for other in others)
