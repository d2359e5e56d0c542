"""What a job is made of, in a folder that nothing changes afterwards: the code, resolved recipes, the batch script.

RUN/jobs/0001/code/           penstock, pretrain, finetune, launch, slurm as they were
              recipe-0.yaml   every value written out; one for each task of an array
              job.sbatch      slurm/STAGE.sbatch with the options of this job
              job.json        its id in the queue
RUN/logs/                     the job's words, and its ranks'
"""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.cluster import ROOT, Cluster, queued, submit
from penstock.errors import InputError

CODE = ("penstock", "pretrain", "finetune", "launch", "slurm")
ARRAY_RECIPE = "recipe-$SLURM_ARRAY_TASK_ID.yaml"


def resolve(stage: str, recipe: str, overrides: Sequence[str], coming: Path | None = None) -> dict[str, Any]:
    """The recipe with every value, by a process that may import torch. Raises InputError with what is wrong in it.

    It says what the run would read and is not here, unless that is in `coming`, a folder that other runs will fill.
    """
    command = [sys.executable, "-m", stage, recipe, *overrides, "--resolved"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(done.stderr.strip() or f"{' '.join(command[1:])} ended with {done.returncode}")
    for line in done.stderr.splitlines():
        if coming is None or str(coming) not in line:
            print(f"{recipe}: {line}", file=sys.stderr)
    return yaml.safe_load(done.stdout)


def resolve_all(asked: Sequence[tuple[str, str, Sequence[str]]], coming: Path | None = None) -> list[dict[str, Any]]:
    """`resolve` for each (stage, recipe, overrides), a few at a time, as each takes seconds to import torch."""
    with ThreadPoolExecutor(max_workers=min(8, len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(lambda each: resolve(each[0], each[1], each[2], coming), asked))


def shown_under(recipe: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A resolved recipe with `tracking.KEY=value` overrides, of strings alone, laid over it."""
    given = {key.removeprefix("tracking."): value for key, _, value in (word.partition("=") for word in overrides)}
    return {**recipe, "tracking": {**recipe["tracking"], **given}}


def check_ranks(recipe: Mapping[str, Any], cluster: Cluster) -> None:
    share = cluster.world * recipe["engine"]["accumulation"]
    if recipe["batch"] % share:
        raise InputError(
            f"batch: {recipe['batch']} is not a multiple of {share}, the {cluster.world} ranks of {cluster.nodes} nodes"
            f" times engine.accumulation; {recipe['batch'] // share * share or share} would be"
        )


@dataclass(frozen=True)
class Submission:
    """A job, or an array of jobs with one recipe each, of a stage.

    Args:
        folder: where `jobs` and `logs` lie: the run's own, or the series'.
        recipes: resolved.
        words: the command that made it, for the reader of the script.
        limit: how many tasks of an array run at once.
    """

    stage: str
    folder: Path
    name: str
    recipes: Sequence[Mapping[str, Any]]
    cluster: Cluster
    words: str
    array: bool = False
    limit: int | None = None

    def script(self, place: Path) -> str:
        """The batch script, for a submission that lies in `place`: the stage's own, with what this job adds."""
        code, logs = place.resolve() / "code", self.folder.resolve() / "logs"
        options = [f"--job-name={self.name}", *self.cluster.sbatch(), f"--comment=run {self.folder.resolve()}"]
        if self.array:
            options.append(f"--array=0-{len(self.recipes) - 1}" + (f"%{self.limit}" if self.limit else ""))
        options.append(f"--output={str(logs).replace('%', '%%')}/{'%A_%a' if self.array else '%j'}.out")
        exports = {"PENSTOCK_CODE": str(code), "PENSTOCK_PYTHON": sys.executable, "PENSTOCK_LOGS": str(logs)}
        if not self.array:
            exports["PENSTOCK_RUN"] = str(self.folder.resolve())
        if self.cluster.ranks:
            exports["PENSTOCK_PROCS"] = str(self.cluster.ranks)
        if self.cluster.torchrun:
            exports["PENSTOCK_TORCHRUN"] = " ".join(self.cluster.torchrun)
        recipe = shlex.quote(str(place.resolve()) + "/") + (ARRAY_RECIPE if self.array else "recipe-0.yaml")
        exports |= commit() | self.cluster.env
        lines = [
            f"# What follows is of this job: {self.words}",
            *(f"#SBATCH {shlex.quote(option)}" for option in options),
            *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
            *self.cluster.setup,
            f"set -- {recipe}",
        ]
        text = (ROOT / "slurm" / f"{self.stage}.sbatch").read_text(encoding="utf-8")
        end = text.index("\n", text.rindex("\n#SBATCH") + 1) + 1
        return text[:end] + "\n".join(lines) + "\n" + text[end:]

    def send(self, after: Sequence[str] = ()) -> str:
        """Freeze and submit; the job's id. Raises InputError where the run waits or runs already."""
        refuse_twice(self.folder)
        return send(self.folder, self.script, self.recipes, after)


@dataclass(frozen=True)
class Command:
    """A job of one process that runs `python -m launch ...` when others have succeeded."""

    folder: Path
    name: str
    arguments: Sequence[str]
    cluster: Cluster

    def script(self, place: Path) -> str:
        code = shlex.quote(str(place.resolve() / "code"))
        small = self.cluster.model_copy(update={"nodes": 1, "gpus": None, "cpus": None})
        output = f"--output={str(self.folder.resolve() / 'logs').replace('%', '%%')}/%j.out"
        asked = [option for option in small.sbatch() if not option.startswith("--signal")]
        options = [f"--job-name={self.name}", "--ntasks=1", *asked, output, "--open-mode=append", "--requeue"]
        return "\n".join(
            [
                "#!/usr/bin/env bash",
                *(f"#SBATCH {shlex.quote(option)}" for option in options),
                "set -euo pipefail",
                *(f"export {name}={shlex.quote(value)}" for name, value in self.cluster.env.items()),
                *self.cluster.setup,
                f"export PYTHONSAFEPATH=1 PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}",
                shlex.join([sys.executable, "-m", "launch", *self.arguments]),
                "",
            ]
        )

    def send(self, after: Sequence[str]) -> str:
        return send(self.folder, self.script, (), after)


def next_place(folder: Path) -> Path:
    numbers = [int(path.name) for path in folder.glob("jobs/*") if path.name.isdigit()]
    return folder / "jobs" / f"{max(numbers, default=0) + 1:04d}"


def send(
    folder: Path, script: Callable[[Path], str], recipes: Sequence[Mapping[str, Any]], after: Sequence[str]
) -> str:
    """Freeze the code and the recipes in `folder`, and submit the script made for their place; the job's id."""
    place = next_place(folder)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    place.mkdir(parents=True)
    try:
        for part in CODE:
            shutil.copytree(ROOT / part, place / "code" / part, ignore=shutil.ignore_patterns("__pycache__"))
        for number, recipe in enumerate(recipes):
            text = yaml.safe_dump(dict(recipe), sort_keys=False, default_flow_style=None, width=110)
            (place / f"recipe-{number}.yaml").write_text(text, encoding="utf-8")
        (place / "job.sbatch").write_text(script(place), encoding="utf-8")
        job = submit(place / "job.sbatch", after)
    except InputError:
        shutil.rmtree(place)
        for empty in (folder / "jobs", folder / "logs", folder, folder.parent):
            with contextlib.suppress(OSError):
                empty.rmdir()
        raise
    (place / "job.json").write_text(json.dumps({"job": job, "after": list(after)}), encoding="utf-8")
    return job


def jobs_of(folder: Path) -> list[str]:
    """Ids of all jobs that were sent for a run or a series, oldest first."""
    found = sorted(folder.glob("jobs/*/job.json"))
    return [json.loads(path.read_text(encoding="utf-8"))["job"] for path in found]


def refuse_twice(folder: Path) -> None:
    waiting = queued(jobs_of(folder))
    if waiting:
        listed = ", ".join(f"{job} ({state.lower()})" for job, state in waiting.items())
        raise InputError(f"{folder} has a job in the queue: {listed}; end it with scancel, or give another name=...")


def commit() -> dict[str, str]:
    """What the frozen code was made of, for the tracked run."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout

    try:
        dirty = bool(git("status", "--porcelain", "--untracked-files=no").strip())
        return {"PENSTOCK_COMMIT": git("rev-parse", "HEAD").strip(), "PENSTOCK_DIRTY": str(dirty).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}
