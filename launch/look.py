"""`python -m launch status [RUN ...]` and `python -m launch logs RUN`: what runs, and what it says."""

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from launch.cluster import queued
from launch.submission import jobs_of
from penstock.compare import duration
from penstock.errors import DONE, INPUT_WRONG, InputError
from penstock.schedule import Length
from penstock.tracking.journal import NAME, Run, is_live, read_lines, read_run

DEPTH = 3  # folders beneath the one given in which runs are looked for: runs/SERIES/RUN
SPEED_OF = 20  # newest reports whose median says how fast a run goes


def add_commands(ways: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    status = ways.add_parser("status", help="runs, their progress, speed, time left and restarts")
    status.add_argument("folders", nargs="*", type=Path, metavar="RUN", help="run folders, or folders of runs")
    status.set_defaults(run=show_status)
    logs = ways.add_parser("logs", help="follow what a run says")
    logs.add_argument("folder", type=Path, metavar="RUN")
    logs.add_argument("--rank", type=int, default=0)
    logs.add_argument("--job", action="store_true", help="the job's own words: queue, restarts, torchrun")
    logs.add_argument("--no-follow", action="store_true", help="print what there is, and end")
    logs.set_defaults(run=show_logs)


def show_status(args: argparse.Namespace, rest: list[str]) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    try:
        folders = [run for given in args.folders or [Path("runs")] for run in runs_in(given)]
    except InputError as error:
        print(f"status: {error}", file=sys.stderr)
        return INPUT_WRONG
    states = states_of(folders)
    columns = ("run", "status", "step", "done", "images/s", "time left", "restarts", "job")
    table = Table(*columns, box=None, pad_edge=False)
    for folder in folders:
        table.add_row(*(escape(cell) for cell in row(folder, states)))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return DONE


def runs_in(given: Path) -> list[Path]:
    """Run folders at or beneath a folder; also those whose job waits for its first start."""

    def there(folder: Path) -> bool:
        return (folder / NAME).is_file() or any(folder.glob("jobs/*/job.json"))

    patterns = ["/".join(["*"] * depth) for depth in range(1, DEPTH)]
    found = [given] if there(given) else []
    found += sorted(folder for pattern in patterns for folder in given.glob(pattern) if there(folder))
    if not found:
        raise InputError(f"{given} is no run and holds none; give a run's folder, or a folder of runs")
    return found


def states_of(folders: list[Path]) -> dict[str, str]:
    """Jobs of these runs that are in the queue; nothing where there is no Slurm."""
    try:
        return queued(job for folder in folders for job in jobs_of(folder))
    except InputError:
        return {}


def row(folder: Path, states: dict[str, str]) -> Iterator[str]:
    yield str(folder)
    job = next((job for job in reversed(jobs_of(folder)) if job in states), "")
    state = states.get(job, "").lower()
    if not (folder / NAME).is_file():
        yield from ("starting" if state == "running" else "queued" if job else "never started", *[""] * 5)
        yield f"{job} {state}".strip()
        return
    run = read_run(folder)
    if is_live(folder) or state == "running":  # file systems without locks do not tell who lives on another node
        yield "running"
    else:
        yield "queued" if job and run.status != "FINISHED" else run.status.lower()
    yield str(run.steps)
    done = progress(run)
    yield f"{done:.0%}" if done is not None else ""
    speed = images_per_second(run)
    yield f"{speed:,.0f}" if speed else ""
    seen = run.last("progress/samples")
    left = seen / speed * (1 / done - 1) if speed and seen and done else 0.0
    yield duration(left) if left else ""
    yield str(sum("attempt" in line for line in read_lines(folder / NAME)) - 1)
    yield f"{job} {state}".strip()


def progress(run: Run) -> float | None:
    """Part of the run that is done; None where that cannot be told."""
    if run.status == "FINISHED":
        return 1.0
    if "duration" not in run.params:
        return None
    length = Length.parse(run.params["duration"])
    axis = {"steps": float(run.steps), "epochs": run.last("progress/epoch"), "samples": run.last("progress/samples")}
    return min((axis.get(length.unit) or 0.0) / length.amount, 1.0)


def images_per_second(run: Run) -> float | None:
    newest = sorted(value for _, value in run.series.get("perf/images_per_second", ())[-SPEED_OF:])
    return newest[len(newest) // 2] if newest else None


def show_logs(args: argparse.Namespace, rest: list[str]) -> int:
    try:
        path = newest_log(args.folder, "*.out" if args.job else f"*/*/rank-{args.rank}.log")
    except InputError as error:
        print(f"logs: {error}", file=sys.stderr)
        return INPUT_WRONG
    print(f"==> {path} <==", flush=True)
    follow = [] if args.no_follow else ["-F"]
    with contextlib.suppress(KeyboardInterrupt):
        return subprocess.run(["tail", "-n", "1000", *follow, str(path)]).returncode
    return DONE


def newest_log(folder: Path, pattern: str) -> Path:
    found = sorted((folder / "logs").glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:  # a series' or a pipeline's own runs, and one of them
        found = sorted((folder / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)
        found += [path for path in [folder.parent / "logs" / f"{folder.name}.log"] if path.is_file()]
    if not found:
        jobs = states_of([folder])
        waits = "; " + ", ".join(f"job {job} is {state.lower()}" for job, state in jobs.items()) if jobs else ""
        raise InputError(
            f"{folder / 'logs'} holds nothing yet{waits}. A run of `launch local` says its words where it was started"
        )
    return found[-1]
