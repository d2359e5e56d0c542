"""`python -m launch slurm STAGE RECIPE --nodes N --time T [key=value ...]`: a run as a Slurm job.

The recipe is checked here, on the login node; code and resolved recipe are frozen in the run's folder, so that a job
that waits runs what was sent. With --sweep, an array: one run for each combination of values.
"""

import argparse
import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.cluster import Cluster, cluster_of
from launch.series import values_given
from launch.submission import Submission, check_ranks, next_place, resolve, resolve_all
from penstock.errors import DONE, INPUT_WRONG, InputError

STAGES = ("pretrain", "finetune")


def add_command(ways: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = ways.add_parser("slurm", help="as a Slurm job, on one node or many")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    add_cluster_options(parser)
    parser.add_argument("--after", action="append", default=[], metavar="JOB", help="begin when this job has succeeded")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=A,B,...", help="a run for each value, as an array of jobs"
    )
    parser.add_argument("--limit", type=int, default=None, help="how many runs of an array go on at once")
    parser.add_argument("--dry-run", action="store_true", help="only print the batch script")
    parser.set_defaults(run=run)


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", default="default", metavar="NAME", help="of configs/launch/NAME.yaml, or a file")
    for option, kind in (("nodes", int), ("time", str), ("partition", str), ("gpus", int), ("cpus", int)):
        field = Cluster.model_fields[option]
        parser.add_argument(f"--{option}", type=kind, default=None, help=field.description or "as sbatch takes it")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="another option of sbatch")


def cluster_given(args: argparse.Namespace) -> Cluster:
    """Raises InputError."""
    given = {name: getattr(args, name) for name in ("nodes", "time", "partition", "gpus", "cpus")}
    cluster = cluster_of(args.cluster, given)
    return cluster_of(args.cluster, {**given, "options": [*cluster.options, *args.sbatch]})


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """The exit code: 0 sent, 2 the input is wrong."""
    try:
        overrides, cluster = values_given(args, rest), cluster_given(args)
        if args.limit is not None and args.limit < 1:
            raise InputError("--limit is at least 1")
        submission = submission_of(args, overrides, cluster)
        if args.dry_run:
            print(submission.script(next_place(submission.folder)), end="")
            return DONE
        job = submission.send(args.after)
    except InputError as error:
        print(f"slurm: {error}", file=sys.stderr)
        return INPUT_WRONG
    print(f"job {job}: {submission.name}, {len(submission.recipes)} run(s) in {submission.folder}")
    print(f"its words: python -m launch logs {submission.folder}")
    return DONE


def submission_of(args: argparse.Namespace, overrides: list[str], cluster: Cluster) -> Submission:
    recipe = resolve(args.stage, args.recipe, overrides)
    folder, recipes = Path(recipe["out"]) / recipe["name"], [recipe]
    if args.sweep:
        folder = folder.with_name(f"{folder.name}-sweep")
        own = ([*values, f"out={folder}", f"name={name_of(values)}"] for values in combinations(args.sweep))
        recipes = resolve_all([(args.stage, args.recipe, [*overrides, *each]) for each in own])
    for each in recipes:
        check_ranks(each, cluster)
    words = shlex.join(["python", "-m", "launch", *sys.argv[1:]]).replace("\n", " ")
    return Submission(args.stage, folder, folder.name, recipes, cluster, words, bool(args.sweep), args.limit)


def combinations(sweeps: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of values, as overrides."""
    axes: list[list[str]] = []
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not equals or not key or not all(values.split(",")):
            raise InputError(f"--sweep {sweep}: write KEY=A,B,...")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return list(itertools.product(*axes))


def name_of(values: Sequence[str]) -> str:
    """A run's name: optim.lr=1e-3, seed=0 is lr=1e-3-seed=0."""
    return "-".join(value.partition("=")[0].rpartition(".")[2] + "=" + value.partition("=")[2] for value in values)
