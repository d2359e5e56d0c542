"""The runs of an ablation: checked before the first starts, each run once, gone on with after an interruption."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.ablate.parts import Part
from launch.ablate.plan import ADD_ONE, Plan, Trial
from launch.launcher import Launcher
from penstock.compare import duration
from penstock.errors import DONE, STOPPED, InputError
from penstock.recipe import difference
from penstock.tracking.journal import NAME, read_run

STAGE = "finetune"
PREDICTIONS = "predictions.npz"
OUTSIDE = ("tracking", "out")  # blocks and keys of a recipe that change nothing in a run's result

Resolve = Callable[[str, list[list[str]]], list[dict | str]]


def resolve(recipe: str, variants: list[list[str]]) -> list[dict | str]:
    """The resolved recipe, or what is wrong with it, for each list of overrides; in a process that may import torch."""
    command = [sys.executable, "-m", f"{STAGE}.variants", recipe]
    done = subprocess.run(command, input=json.dumps(variants), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"{' '.join(command[1:])} ended with {done.returncode}; its own words are above")
    return json.loads(done.stdout.splitlines()[-1])


def check(plan: Plan, parts: Sequence[Part], resolve: Resolve) -> dict[str, dict[str, Any]]:
    """The resolved recipe of each variant, and of the base as `full`.

    Raises InputError for a variant that cannot run, a part that the recipe does not have, and a part that changes
    nothing where the others are off.
    """
    off = {"full": [], **{f"without-{part.name}": [part.name] for part in parts}, **plan.variants}
    found = dict(zip(off, resolve(plan.recipe, [plan.values(each) for each in off.values()]), strict=True))
    if isinstance(found["full"], str):
        raise InputError(found["full"])
    wrong = [f"{name}: {words}" for name, words in found.items() if isinstance(words, str)]
    if wrong:
        raise InputError("\n".join(wrong))
    recipes: dict[str, dict[str, Any]] = {name: each for name, each in found.items() if isinstance(each, dict)}
    for part in parts:
        if not difference(recipes["full"], recipes[f"without-{part.name}"]):
            has = ", ".join(f"{key}={value}" for key, value in part.off.items())
            hint = f"; to have it on, write for example {part.on}" if part.on else ""
            raise InputError(f"{part.name}: {plan.recipe} has it off already ({has}){hint}")
    for contrast in plan.contrasts:
        if contrast.kind == ADD_ONE and not difference(recipes[contrast.on], recipes[contrast.off]):
            raise InputError(
                f"{contrast.part} changes nothing where the other parts are off, so it cannot be added alone: another "
                "part switches the same keys; leave one of them out, or give --leave-one-out"
            )
    return recipes


@dataclass
class Series:
    """The runs of a plan in its folder."""

    plan: Plan
    folder: Path
    recipes: Mapping[str, dict[str, Any]]  # resolved, by variant
    tracking: Sequence[str]  # overrides by which the runs are shown under the ablation's own

    def expected(self, trial: Trial) -> dict[str, Any]:
        return {**self.recipes[trial.variant], "name": trial.name, "seed": trial.seed}

    def arguments(self, trial: Trial) -> list[str]:
        own = [f"out={self.folder}", f"name={trial.name}", f"seed={trial.seed}", *self.tracking]
        return [self.plan.recipe, *self.plan.values(self.plan.variants[trial.variant]), *own]

    def refuse_changed(self) -> None:
        """Raises InputError where a run in the folder, finished or not, was another recipe's."""
        for trial in self.plan.trials():
            changed = changes(self.folder / trial.name, self.expected(trial))
            if changed:
                differing = "\n".join(f"  {key}: {was} there, {now} now" for key, (was, now) in changed.items())
                raise InputError(
                    f"{self.folder / trial.name} is a run of another recipe:\n{differing}\nGive this ablation another "
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

    def _left(self, trials: Sequence[Trial]) -> str:
        took = [read_run(self.folder / each.name).seconds for each in self.plan.trials() if self._done(each)]
        left = [trial for trial in trials if not self._done(trial)]
        return f", about {duration(sum(took) / len(took) * len(left))} left" if took else ""

    def _done(self, trial: Trial) -> bool:
        return finished(self.folder / trial.name)


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
