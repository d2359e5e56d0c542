"""A series of runs as one array of Slurm jobs, and a last small job that shows what came out of it."""

import argparse
import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.cluster import Cluster
from launch.slurm import add_cluster_options, cluster_given
from launch.submission import Command, Submission, check_ranks, refuse_twice, shown_under
from penstock.errors import InputError

if TYPE_CHECKING:
    from launch.series import Series


@dataclass(frozen=True)
class Array:
    """How the runs of a series go to Slurm.

    Args:
        limit: how many of them go on at once.
        words: the command, which goes on here (--no-slurm) when all runs have succeeded.
    """

    cluster: Cluster
    limit: int | None
    words: list[str]

    def refuse_twice(self, series: "Series") -> None:
        """Raises InputError where its array, or its last job, is in the queue."""
        refuse_twice(series.folder)

    def send(self, series: "Series", stage: str) -> str:
        """What was sent, in words. Raises InputError."""
        recipes: list[dict[str, Any]] = []
        for trial in series.left():
            recipe = series.expected(trial)
            check_ranks(recipe, self.cluster)
            recipes.append(shown_under({**recipe, "out": str(series.folder)}, series.tracking))
        name, words = series.folder.name, shlex.join(["python", "-m", "launch", *self.words]).replace("\n", " ")
        job = Submission(stage, series.folder, name, recipes, self.cluster, words, True, self.limit).send()
        end = Command(series.folder, f"{name}-end", [*self.words, "--no-slurm"], self.cluster).send([job])
        return f"{len(recipes)} runs in the array {job}; job {end} shows what came out of them"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slurm", action=argparse.BooleanOptionalAction, default=False, help="the runs as an array of jobs"
    )
    parser.add_argument("--limit", type=int, default=None, help="how many jobs of the array run at once")
    add_cluster_options(parser)


def array_given(args: argparse.Namespace) -> Array | None:
    """Raises InputError."""
    if not getattr(args, "slurm", False):
        return None
    if args.limit is not None and args.limit < 1:
        raise InputError("--limit is at least 1")
    return Array(cluster_given(args), args.limit, sys.argv[1:])
