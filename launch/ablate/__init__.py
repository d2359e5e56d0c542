"""`python -m launch ablate RECIPE --over mixup,erase --seeds 3`: what each part of a recipe does.

Runs the recipe without each part (leave one out) and each part alone (add one), and reports effects with paired
intervals over the same validation images, and costs in time. The same command goes on where it was interrupted.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from launch.ablate.parts import choose
from launch.ablate.plan import ADD_ONE, KINDS, LEAVE_ONE_OUT, Plan
from launch.array import add_options, array_given
from launch.launcher import Launcher, Local
from launch.series import say, values_given
from penstock.errors import DONE, INPUT_WRONG, InputError


def add_command(ways: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = ways.add_parser("ablate", help="what each part of a finetune recipe does, with paired intervals")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--over", action="append", default=[], metavar="PARTS", help="mixup,erase,..., or name:key=value-without-it"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant, with seeds from the recipe's on")
    parser.add_argument("--procs", type=int, default=None, help="ranks of each run, as of `launch local`")
    parser.add_argument("--threads", type=int, default=None, help="threads of each rank, as of `launch local`")
    parser.add_argument("--metric", choices=["top1", "ece", "nll"], default="top1", help="what the table is about")
    half = parser.add_mutually_exclusive_group()
    half.add_argument(f"--{LEAVE_ONE_OUT}", dest="kinds", action="store_const", const=(LEAVE_ONE_OUT,), default=KINDS)
    half.add_argument(f"--{ADD_ONE}", dest="kinds", action="store_const", const=(ADD_ONE,))
    parser.add_argument("--report", action="store_true", help="only show what the runs so far have found")
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """The exit code: 0 done, 1 some runs failed, 2 the input is wrong, 75 stopped and resumable."""
    try:
        overrides = values_given(args, rest)
        if args.seeds < 1:
            raise InputError("--seeds is at least 1; intervals over seeds need at least 2, and 3 or more to be narrow")
        return ablate(args, overrides, Local(args.procs, args.threads))
    except InputError as error:
        print(f"ablate: {error}", file=sys.stderr)
        return INPUT_WRONG


def ablate(args: argparse.Namespace, overrides: list[str], launcher: Launcher) -> int:
    from launch.ablate.check import check
    from launch.series import Series, follow, resolve
    from penstock.recipe import load

    values = load(args.recipe, overrides).values
    folder = Path(values.get("out", "runs")) / f"{values.get('name', Path(args.recipe).stem)}-ablation"
    if args.report:
        return show(folder, args.metric)
    parts = choose(args.over, values)
    first = int(values.get("seed", 0))
    plan = Plan.of(args.recipe, overrides, parts, range(first, first + args.seeds), args.kinds)
    recipes = check(plan, parts, resolve)
    series = Series(plan, folder, recipes)
    series.refuse_changed()
    array = array_given(args)
    plan.save(folder)
    params = {"recipe": recipes["full"], "ablate": {"parts": plan.parts, "seeds": plan.seeds}}
    return follow(series, "ablate", params, launcher, lambda tracker: show(folder, args.metric, tracker), array=array)


def show(folder: Path, metric: str, tracker: Any = None) -> int:
    """Print the table; with a tracker, also keep table, JSON and picture beside it."""
    from rich.console import Console

    from launch.ablate.picture import draw
    from launch.ablate.report import as_json, report, table

    made = report(folder, metric)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table(made))
    if tracker is None or not made.findings:
        return DONE
    (folder / "report.json").write_text(json.dumps(as_json(made), indent=1), encoding="utf-8")
    draw(made, folder / "effects.png")
    for file in ("report.json", "effects.png"):
        tracker.artifact(folder / file)
    for found in made.findings:
        for name, effect in found.effects.items():
            kind = found.contrast.kind.replace("-", "_")
            for limit in ("value", "low", "high"):
                metrics = {f"{kind}/{found.contrast.part}/{name}_{limit}": getattr(effect, limit)}
                tracker.log(len(made.runs), metrics)
    say(f"kept in {folder}: report.json, effects.png")
    return DONE
