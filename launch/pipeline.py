"""`python -m launch pipeline PIPELINE.yaml`: pretrain, finetune, distill, each step from what another one exported.

    name: digits                        # the folder of its runs, in `out`
    steps:
      pretrain: {stage: pretrain, recipe: configs/demo/mae_digits.yaml}
      finetune: {stage: finetune, recipe: configs/demo/finetune_digits.yaml, weights: pretrain}
      student: {stage: finetune, recipe: configs/demo/distill_digits.yaml, teacher: finetune, set: [seed=1]}

Here, in order; with --slurm as jobs that wait for each other. Started again, it goes on where it was. All runs are
shown under one parent run.
"""

import argparse
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from launch.cluster import Cluster, cluster_of, queued
from launch.launcher import Local
from launch.series import SIGNALS, changes, last_lines, say, store, values_given
from launch.slurm import add_cluster_options, cluster_given
from launch.submission import Command, Submission, check_ranks, jobs_of, resolve_all, shown_under
from penstock.errors import DONE, INPUT_WRONG, STOPPED, InputError
from penstock.recipe import Block, Rule, check, load
from penstock.tracking.journal import NAME, read_run

FAILED = 1


class Step(Block):
    """A run of a pipeline."""

    stage: Literal["pretrain", "finetune"]
    recipe: str
    set: list[str] = Field([], description="key=value over the recipe's")
    weights: str | None = Field(None, description="the step whose backbone this one starts from")
    teacher: str | None = Field(None, description="the step whose classifier this one learns from")
    cluster: dict[str, Any] = Field({}, description="what its job asks for, over configs/launch: {nodes: 4}")

    @property
    def after(self) -> list[str]:
        """Steps that it needs."""
        return [name for name in (self.weights, self.teacher) if name]


def steps_follow_each_other(pipeline: "Pipeline") -> Iterator[str]:
    before: list[str] = []
    for name, step in pipeline.steps.items():
        for key in ("weights", "teacher"):
            if (needed := getattr(step, key)) and needed not in before:
                known = f"one of {', '.join(before)}" if before else "none, as it is the first"
                yield f"steps.{name}.{key}: no step before this one is called {needed!r}; write {known}"
        before.append(name)


class Pipeline(Block):
    name: str
    out: Path = Path("runs")
    steps: dict[str, Step] = Field(min_length=1)

    rules: ClassVar[tuple[Rule, ...]] = (steps_follow_each_other,)

    @property
    def folder(self) -> Path:
        return self.out / self.name

    def arguments(self, name: str) -> list[str]:
        """Overrides of a step's recipe."""
        step = self.steps[name]
        given = [*step.set, f"out={self.folder}", f"name={name}"]
        if step.weights:
            given.append(f"backbone.weights={self.folder / step.weights / 'export'}")
        if step.teacher:
            given.append(f"task.teacher={self.folder / step.teacher}")
        return given


def add_command(ways: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = ways.add_parser("pipeline", help="runs that start from each other, here or on Slurm")
    parser.add_argument("pipeline", metavar="PIPELINE")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the pipeline's own file")
    parser.add_argument("--procs", type=int, default=None, help="ranks of each run here, as of `launch local`")
    parser.add_argument("--threads", type=int, default=None, help="threads of each rank, as of `launch local`")
    parser.add_argument(
        "--slurm", action=argparse.BooleanOptionalAction, default=False, help="as jobs, each waiting for those it needs"
    )
    add_cluster_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """The exit code: 0 done, or sent; 1 a step failed; 2 the input is wrong; 75 stopped and resumable."""
    try:
        pipeline = check(Pipeline, load(args.pipeline, values_given(args, rest)))
        asked = [(step.stage, step.recipe, pipeline.arguments(name)) for name, step in pipeline.steps.items()]
        recipes = dict(zip(pipeline.steps, resolve_all(asked, coming=pipeline.folder), strict=True))
        refuse_changed(pipeline, recipes)
        if args.slurm:
            return Jobs(pipeline, recipes, args).send()
        return run_here(pipeline, recipes, Local(args.procs, args.threads))
    except InputError as error:
        print(f"pipeline: {error}", file=sys.stderr)
        return INPUT_WRONG


def refuse_changed(pipeline: Pipeline, recipes: Mapping[str, dict[str, Any]]) -> None:
    for name, recipe in recipes.items():
        changed = changes(pipeline.folder / name, recipe)
        if changed:
            listed = "\n".join(f"  {key}: {was} there, {now} now" for key, (was, now) in changed.items())
            raise InputError(
                f"{pipeline.folder / name} is a run of another recipe:\n{listed}\nGive the pipeline another name "
                f"(name=...), or move {pipeline.folder / name} and what came after it away"
            )


def finished(folder: Path) -> bool:
    return (folder / NAME).is_file() and read_run(folder).status == "FINISHED"


def open_parent(pipeline: Pipeline, recipes: Mapping[str, dict[str, Any]]) -> tuple[Any, list[str]]:
    """The tracked run that the steps are shown under, and the overrides that put a step there."""
    from penstock.tracking import Tracker

    config = Tracker.Config(**next(iter(recipes.values()))["tracking"])
    params = {"steps": {name: step.model_dump(mode="json") for name, step in pipeline.steps.items()}}
    tracker = Tracker(config, pipeline.folder, pipeline.name, params, {"stage": "pipeline"}, active=True)
    for name, step in pipeline.steps.items():
        tracker.tag(f"lineage.{name}", " and ".join(step.after) or "none")
    return tracker, [f"tracking.parent={tracker.id}", *store(config, pipeline.folder)]


def run_here(pipeline: Pipeline, recipes: Mapping[str, dict[str, Any]], launcher: Local) -> int:
    """Each step that is not finished, in order; a step that fails ends the pipeline."""
    stopping: list[int] = []

    def stop(number: int, frame: object) -> None:
        stopping.append(number)
        launcher.stop()

    for each in SIGNALS:
        signal.signal(each, stop)
    tracker, shown = open_parent(pipeline, recipes)
    code = DONE
    try:
        for number, (name, step) in enumerate(pipeline.steps.items(), 1):
            if finished(pipeline.folder / name):
                continue
            say(f"step {number} of {len(pipeline.steps)}: {name}")
            log = pipeline.folder / "logs" / f"{name}.log"
            code = STOPPED
            if not stopping:
                code = launcher.run(step.stage, [step.recipe, *pipeline.arguments(name), *shown], log)
            if code:
                break
    except BaseException:
        tracker.close("FAILED")
        raise
    tracker.close("KILLED" if code == STOPPED else "FAILED" if code else "FINISHED")
    if code == STOPPED:
        say("stopped; the same command goes on from here")
    elif code:
        say(f"{name} failed with exit code {code}; its words: {log}\n{last_lines(log)}")
    return code if code in (DONE, STOPPED) else FAILED


@dataclass
class Jobs:
    """A pipeline as Slurm jobs: `afterok` between them, and a last small one that closes the parent run."""

    pipeline: Pipeline
    recipes: Mapping[str, dict[str, Any]]
    args: argparse.Namespace

    def send(self) -> int:
        left = [name for name in self.pipeline.steps if not finished(self.pipeline.folder / name)]
        clusters = {name: self.cluster(name) for name in left}
        for name in left:
            check_ranks(self.recipes[name], clusters[name])
        tracker, shown = open_parent(self.pipeline, self.recipes)
        jobs: dict[str, str] = {}
        try:
            for name in left:
                jobs[name] = self.job_of(name, clusters[name], jobs, shown)
            self.conclude(list(jobs.values()))
        except BaseException:
            tracker.close("FAILED")
            raise
        tracker.close("SCHEDULED" if left else "FINISHED")
        return DONE

    def cluster(self, name: str) -> Cluster:
        general = cluster_given(self.args)
        return cluster_of(self.args.cluster, {**general.model_dump(), **self.pipeline.steps[name].cluster})

    def job_of(self, name: str, cluster: Cluster, jobs: Mapping[str, str], shown: Sequence[str]) -> str:
        """The job of a step: the one that waits or runs already, or a new one."""
        step, folder = self.pipeline.steps[name], self.pipeline.folder / name
        waiting = queued(jobs_of(folder))
        if waiting:
            job, state = next(iter(waiting.items()))
            say(f"{name}: job {job}, {state.lower()}")
            return job
        recipe = shown_under(self.recipes[name], shown)
        words = f"a step of the pipeline {self.args.pipeline}"
        submission = Submission(step.stage, folder, f"{self.pipeline.name}-{name}", [recipe], cluster, words)
        after = [jobs[needed] for needed in step.after if needed in jobs]
        job = submission.send(after)
        say(f"{name}: job {job}" + (f", after {', '.join(after)}" if after else ""))
        return job

    def conclude(self, jobs: Sequence[str]) -> None:
        if not jobs or queued(jobs_of(self.pipeline.folder)):
            return
        words = [*sys.argv[1:], "--no-slurm"]  # which finds every step finished
        command = Command(self.pipeline.folder, f"{self.pipeline.name}-end", words, cluster_given(self.args))
        say(f"its end: job {command.send(jobs)}")
