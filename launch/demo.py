"""The demo behind `make demo`: pack digits, pretrain without labels, compare with the same backbone untrained."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

DIGITS = Path("data/digits")
RUN = Path("runs/mae-digits")
RECIPE = "configs/demo/mae_digits.yaml"
NEXT = """
kNN and linear top-1 learn from every label, "1 label" from a single one per class.
Look at it    make ui, and open the address it prints; reconstructions are artifacts
Another run   .venv/bin/python -m launch local --procs 2 pretrain \\
                  configs/demo/mae_digits.yaml name=hidden-75 method.mask_ratio=0.75
Your images   see the README"""


def add_command(ways: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    ways.add_parser("demo", help="handwritten digits from packing to a table, in minutes").set_defaults(run=run)


def run(args: argparse.Namespace, rest: list[str]) -> int:
    began = time.monotonic()
    for part, split in (("train", "train"), ("test", "val")):
        if not (DIGITS / split / "manifest.json").is_file():
            code = _call("-m", "penstock.cli", "shards", "pack", f"digits:{part}", str(DIGITS / split))
            if code:
                return code
    code = _call("-m", "launch", "local", "--procs", "2", "pretrain", RECIPE)
    if code:
        return code
    found = subprocess.run(
        [sys.executable, "-m", "penstock.cli", "compare", str(RUN), "--format", "json", "--metrics", "*"],
        stdout=subprocess.PIPE,
        check=True,
    )
    _print(json.loads(found.stdout)["runs"][0], time.monotonic() - began)
    return 0


def _call(*command: str) -> int:
    return subprocess.run([sys.executable, *command]).returncode


def _print(run: dict, seconds: float) -> None:
    metrics = run["results"]

    def percent(name: str) -> str:
        return f"{metrics[name]:.1f} %"

    title = "Handwritten digits, 16 x 16: 1,438 to learn from, 359 to test on"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("run", "what it did", "kNN", "linear top-1", "1 label", "images/s", "time"):
        table.add_column(column, justify="left" if column in ("run", "what it did") else "right", no_wrap=True)
    for name, what, where, speed, took in (
        ("untrained", "random weights", "untrained", "", ""),
        (RUN.name, "MAE, no labels", "final", f"{metrics['perf/images_per_second']:.0f}", f"{seconds:.0f} s"),
    ):
        shown = [percent(f"{where}/{m}") for m in ("knn_top1", "linear_top1", "linear_top1_1_per_class")]
        table.add_row(name, what, *shown, speed, took)
    console = Console()
    console.print(table)
    console.print(NEXT, highlight=False, soft_wrap=True)
