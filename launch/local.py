"""Ranks on this machine: torchrun with sane threads, a rendezvous of its own, and the stage's own exit code."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAGES = ("pretrain", "finetune", "finetune.teacher")
INPUT_WRONG = 2
TIME_TO_SAVE = 600  # seconds that torchrun leaves ranks to save before it kills them


def add_command(ways: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = ways.add_parser("local", help="on this machine, under torchrun")
    parser.add_argument("--procs", type=int, default=None, help="ranks; one per GPU, or on a CPU one, by default")
    parser.add_argument(
        "--threads", type=int, default=None, help="threads of each rank; the cores shared out by default"
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Run the stage to its end; its exit code."""
    procs = args.procs or gpus() or 1
    cores = len(os.sched_getaffinity(0))
    if procs < 1 or (args.threads is not None and args.threads < 1):
        print("launch: --procs and --threads are at least 1", file=sys.stderr)
        return INPUT_WRONG
    if not gpus() and procs > cores:
        print(f"launch: {procs} ranks share {cores} cores; they will be slow", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        exit_file = Path(folder) / "exit"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(args.threads or max(1, cores // procs)),
            "PENSTOCK_EXIT_FILE": str(exit_file),
            "PENSTOCK_BEGAN": str(time.time()),
            "PYTHONFAULTHANDLER": "1",
        }
        child = subprocess.Popen(command(procs, args.stage, [args.recipe, *args.overrides, *rest]), env=environment)
        _forward_signals(child)
        code = child.wait()
        return code if code >= 0 else 128 - code


def command(procs: int, stage: str, rest: list[str]) -> list[str]:
    """torchrun on this machine alone. `--standalone` picks a free port, so runs side by side do not meet."""
    return [
        *(sys.executable, "-m", "penstock.torchrun", "--standalone", "--nproc-per-node", str(procs)),
        *("--max-restarts", "0", "--shutdown-timeout", str(TIME_TO_SAVE)),
        *("-m", stage, *rest),
    ]


def gpus() -> int:
    """GPUs that this machine shows, without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([one for one in visible.split(",") if one.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").is_dir() else 0


def _forward_signals(child: "subprocess.Popen[bytes]") -> None:
    """A signal to the launcher reaches the ranks as SIGTERM through torchrun, which dies of others and orphans them."""

    def forward(number: int, frame: object) -> None:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, forward)
