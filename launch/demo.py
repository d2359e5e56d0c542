"""The demo behind `make demo`: pack digits, pretrain without labels, finetune, distill, and compare all of it."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

DIGITS = Path("data/digits")
RUNS = Path("runs")
PRETRAIN, FINETUNE = "configs/demo/mae_digits.yaml", "configs/demo/finetune_digits.yaml"
DISTILL = "configs/demo/distill_digits.yaml"
STUDENTS = RUNS / "distill-digits-distillation"
COMPARE = (sys.executable, "-m", "penstock.cli", "compare")
SCRATCH = ("name=scratch-digits", "backbone.weights=null")
NEXT = """
In per cent. kNN and the linear probe learn from every label, "1 label" from a single one per class, on features that
MAE learned without any. Top-1 is the network's own, trained with every label, from random or from MAE's weights; the
students learn from random weights, alone or from the finetuned network's answers, on the same images and steps. The
calibration error (ECE) is before and after temperature scaling.
Look at it    {picture}
              make ui, and open the address it prints; reconstructions, mistakes and calibration are artifacts
Deploy it     .venv/bin/penstock predict {student} data/digits/val
Another run   .venv/bin/python -m launch local --procs 2 finetune \\
                  configs/demo/finetune_digits.yaml name=few data.labels=10% duration="60 epochs"
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
    for stage, recipe, changes in (
        ("pretrain", PRETRAIN, ()),
        ("finetune", FINETUNE, ()),
        ("finetune", FINETUNE, SCRATCH),
    ):
        code = _call("-m", "launch", "local", "--procs", "2", stage, recipe, *changes)
        if code:
            return code
    distill = ("-m", "launch", "distill", "--procs", "2", "--beside", f"scratch-digits={RUNS / 'scratch-digits'}")
    if code := _call(*distill, DISTILL):
        return code
    runs = [RUNS / name for name in ("mae-digits", "finetune-digits", "scratch-digits")]
    runs += [STUDENTS / name for name in ("distilled-seed0", "alone-seed0")]
    found = subprocess.run(
        [*COMPARE, *map(str, runs), "--format", "json", "--metrics", "*"], stdout=subprocess.PIPE, check=True
    )
    report = json.loads((STUDENTS / "report.json").read_text(encoding="utf-8"))
    _print(json.loads(found.stdout)["runs"], report, time.monotonic() - began)
    return 0


def _call(*command: str) -> int:
    return subprocess.run([sys.executable, *command]).returncode


def _print(runs: list[dict], report: dict, seconds: float) -> None:
    pretrained, finetuned, scratch, distilled, alone = runs
    title = f"Handwritten digits, 16 x 16: 1,438 to learn from, 359 to test on; {seconds:.0f} s in all"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    left = ("run", "from")
    for column in (*left, "size", "kNN", "linear", "1 label", "top-1", "ECE", "time"):
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    sizes = {row["name"]: f"{row['cost']['parameters'] / 1000:.0f} k" for row in report["students"]}
    large = f"{report['teacher']['cost']['parameters'] / 1000:.0f} k"
    for name, start, where in (("untrained", "", "untrained"), ("mae-digits", "random", "final")):
        metrics = pretrained["results"]
        figures = [f"{metrics[f'{where}/{m}']:.1f}" for m in ("knn_top1", "linear_top1", "linear_top1_1_per_class")]
        table.add_row(name, start, large, *figures, "", "", _time(pretrained) if where == "final" else "")
    for run, name, start, size in (
        (scratch, "scratch-digits", "random", large),
        (finetuned, "finetune-digits", "MAE", large),
        (alone, "alone", "random", sizes["alone"]),
        (distilled, "distilled", "random, teacher", sizes["distilled"]),
    ):
        metrics = run["results"]
        ece = f"{metrics['final/ece_unscaled']:.1f} > {metrics['final/ece_scaled']:.1f}"
        table.add_row(name, start, size, "", "", "", f"{metrics['final/top1']:.1f}", ece, _time(run))
    console = Console()
    console.print(table)
    words = NEXT.format(picture=STUDENTS / "students.png", student=STUDENTS / "distilled-seed0")
    console.print(words, highlight=False, soft_wrap=True)


def _time(run: dict) -> str:
    return f"{run['seconds']:.0f} s"
