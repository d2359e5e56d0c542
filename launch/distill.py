"""`python -m launch distill RECIPE --seeds 3`: is the student better for its teacher, and what does it cost?

Runs the recipe's student with its teacher and alone, on the same budget and the same views, then reports teacher and
students side by side with `penstock students`. The same command goes on where it was interrupted.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.array import add_options, array_given
from launch.launcher import Launcher, Local
from launch.series import Series, Trial, beneath, finished, follow, resolve, say, values_given
from penstock.errors import INPUT_WRONG, InputError

ALONE, DISTILLED, ONLINE = "alone", "distilled", "online"
LOSSES = "task.losses"
LATENCY_ROUNDS = 5
REPORT = "report.json"


@dataclass
class Students:
    """The runs of a distillation: variants by name, each a set of values that go before the recipe's."""

    recipe: str
    overrides: list[str]
    seeds: list[int]
    variants: dict[str, dict[str, str]]

    def trials(self) -> list[Trial]:
        return [Trial(variant, seed) for seed in self.seeds for variant in self.variants]

    def overrides_of(self, variant: str) -> list[str]:
        own = self.variants[variant]
        kept = [given for given in self.overrides if not beneath(given.partition("=")[0].strip(), own)]
        return [*kept, *(f"{key}={value}" for key, value in own.items())]


def add_command(ways: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = ways.add_parser("distill", help="a student with its teacher and alone, compared in one table and picture")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each variant, with seeds from the recipe's on")
    parser.add_argument("--losses", metavar="A,B", help="a variant for each of these losses by itself")
    parser.add_argument("--online", action="store_true", help="where the recipe has a cache, a variant without it, too")
    parser.add_argument(
        "--beside", action="append", default=[], metavar="NAME=RUN", help="another network for the table and picture"
    )
    parser.add_argument("--procs", type=int, default=None, help="ranks of each run, as of `launch local`")
    parser.add_argument("--threads", type=int, default=None, help="threads of each rank, as of `launch local`")
    parser.add_argument("--report", action="store_true", help="only show what the runs so far have found")
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """The exit code: 0 done, 1 some runs failed, 2 the input is wrong, 75 stopped and resumable."""
    try:
        overrides = values_given(args, rest)
        if args.seeds < 1:
            raise InputError("--seeds is at least 1")
        return distill(args, overrides, Local(args.procs, args.threads))
    except InputError as error:
        print(f"distill: {error}", file=sys.stderr)
        return INPUT_WRONG


def distill(args: argparse.Namespace, overrides: list[str], launcher: Launcher) -> int:
    plan, base = planned(args, overrides)
    recipes = resolved_all(plan)
    folder = Path(base["out"]) / f"{base['name']}-distillation"
    series = Series(plan, folder, recipes)
    if args.report:
        series.refuse_changed()
        return report(series, recipes[DISTILLED], args.beside)

    def show(tracker: Any) -> int:
        return report(series, recipes[DISTILLED], args.beside, tracker)

    params = {"recipe": recipes[DISTILLED], "distill": {"seeds": plan.seeds, "variants": plan.variants}}
    return follow(series, "distill", params, launcher, show, show_stopped=False, array=array_given(args))


def planned(args: argparse.Namespace, overrides: list[str]) -> tuple[Students, dict[str, Any]]:
    """The plan, and the recipe as it is. Raises InputError where it does not distill."""
    (base,) = resolve(args.recipe, [overrides])
    if isinstance(base, str):
        raise InputError(base)
    if base.get("task", {}).get("name") != "distill":
        raise InputError(f"{args.recipe} distills nothing; give it task=distill and task.teacher=RUN")
    variants: dict[str, dict[str, str]] = {DISTILLED: {}, ALONE: {"task": "classify"}}
    for name in filter(None, (args.losses or "").split(",")):
        losses = base["task"]["losses"]
        off = {f"{LOSSES}.{other}": "null" for other in losses if other != name}
        variants[name] = off if losses.get(name) else {**off, f"{LOSSES}.{name}": "{}"}  # else at its defaults
    if args.online:
        if not base["task"].get("cache"):
            raise InputError(f"--online: {args.recipe} has no cached teacher, so it is online as it is")
        variants[ONLINE] = {"task.cache": "null"}
    return Students(args.recipe, overrides, list(range(base["seed"], base["seed"] + args.seeds)), variants), base


def resolved_all(plan: Students) -> dict[str, dict[str, Any]]:
    """The resolved recipe of each variant. Raises InputError for those that cannot run."""
    found = dict(zip(plan.variants, resolve(plan.recipe, [*map(plan.overrides_of, plan.variants)]), strict=True))
    wrong = [f"{name}: {words}" for name, words in found.items() if isinstance(words, str)]
    if wrong:
        raise InputError("\n".join(wrong))
    return {name: each for name, each in found.items() if isinstance(each, dict)}


def report(series: Series, recipe: dict[str, Any], beside: Sequence[str], tracker: Any = None) -> int:
    """Teacher and students so far, measured side by side in a process that may import torch."""
    done: dict[str, list[Path]] = {}
    for trial in series.plan.trials():
        if finished(series.folder / trial.name):
            done.setdefault(trial.variant, []).append(series.folder / trial.name)
    if not done:
        say("no run has finished yet")
        return 0
    command = command_of(recipe, done, beside)
    if tracker is not None:
        command += ["--out", str(series.folder)]
    code = subprocess.run(command).returncode
    if code:
        say(f"{' '.join(command[1:])} ended with {code}")
    elif tracker is not None:
        keep(series.folder, tracker)
    return code


def command_of(recipe: dict[str, Any], done: dict[str, list[Path]], beside: Sequence[str]) -> list[str]:
    students = [f"{name}={','.join(map(str, runs))}" for name, runs in done.items()]
    command = [sys.executable, "-m", "penstock.cli", "students", recipe["task"]["teacher"], *students, *beside]
    options = ["--rounds", str(LATENCY_ROUNDS), "--no-track"]  # the parent run tracks it
    return [*command, "--data", str(recipe["data"]["val"]), *options]


def keep(folder: Path, tracker: Any) -> None:
    """Figures as metrics of the parent run, table and picture as its artifacts."""
    for file in (REPORT, "report.md", "students.png"):
        tracker.artifact(folder / file)
    step = len(tracker.journal.attempts)  # one more each time that the command goes on
    made = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    for row in (made["teacher"], *made["students"]):
        costs = {name: row["cost"][name] for name in ("parameters", "macs", "bytes")}
        costs |= {f"latency_ms_{batch}": each["median"] for batch, each in row["cost"]["latency_ms"].items()}
        tracker.log(
            step, {f"{row['name']}/{name}": float(value) for name, value in {**row["figures"], **costs}.items()}
        )
    for gain in made["gains"]:
        for metric, effect in gain["effects"].items():
            limits = ("value", "low", "high")
            tracker.log(step, {f"gain/{gain['distilled']}/{metric}_{limit}": float(effect[limit]) for limit in limits})
