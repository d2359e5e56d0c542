"""Seconds from the command to the first step, and to the first step of a resume, for the demo on two ranks.

    python -m tests.benchmarks.startup

Packs the digits into a temporary folder and starts the demo through the launcher: as it stands, measuring the untrained
backbone before the first step; without evaluations; and again, to resume. A step is done when the ledger holds it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks._report import print_facts, print_table

RECIPE = "configs/demo/mae_digits.yaml"
GOAL = 15.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.startup", description=__doc__.partition("\n")[0])
    parser.add_argument("--procs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    print_facts()
    seconds: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="penstock-startup-") as name:
        folder = Path(name)
        for part, split in (("train", "train"), ("test", "val")):
            command = ["-m", "penstock.cli", "shards", "pack", f"digits:{part}", str(folder / split)]
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for number in range(args.rounds):
            for kind, run, steps, overrides in (
                ("fresh", "as_it_stands", 2, []),
                ("fresh, no evaluation", "bare", 2, ["evaluate=null"]),
                ("resumed", "bare", 4, ["evaluate=null"]),
            ):
                began = os.times()
                out = folder / f"{run}{number}"
                seconds.setdefault(kind, []).append(_time_to_first_step(folder, out, args.procs, steps, overrides))
                now = os.times()
                used = now.children_user + now.children_system - began.children_user - began.children_system
                cpu.setdefault(kind, []).append(used)
    rows = [
        [kind, f"{statistics.median(taken):.1f} s", f"{min(taken):.1f} s", f"{min(cpu[kind]):.1f} s"]
        for kind, taken in seconds.items()
    ]
    title = f"From the command to the first step, {args.procs} ranks (goal {GOAL:.0f} s)"
    print_table(title, ["", "median", "best", "CPU of the whole run"], rows)


def _time_to_first_step(data: Path, out: Path, procs: int, steps: int, more: list[str]) -> float:
    ledger = out / "mae-digits" / "ledger"
    before = sum(file.stat().st_size for file in ledger.glob("*")) if ledger.is_dir() else 0
    overrides = [f"data.train={data / 'train'}", f"data.val={data / 'val'}", f"out={out}", f"duration={steps} steps"]
    overrides += ["data.ledger=true", "monitor.pictures=null", "checkpoint.every=1 steps", *more]
    command = [sys.executable, "-m", "launch", "local", "--procs", str(procs), "pretrain", RECIPE, *overrides]
    began = time.monotonic()
    with (out.parent / "output.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    taken = None
    while process.poll() is None:
        if taken is None and sum(file.stat().st_size for file in ledger.glob("*")) > before:
            taken = time.monotonic() - began
        time.sleep(0.02)
    if process.returncode or taken is None:
        raise SystemExit((out.parent / "output.log").read_text(encoding="utf-8"))
    return taken


if __name__ == "__main__":
    main()
