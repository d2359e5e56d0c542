"""Starting real runs, and reading what they leave behind."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

RECIPE = """
name: run
duration: 24 steps
batch: 32
data: {{train: {digits}/train, val: {digits}/val, workers: 0, ledger: true}}
augment: {{name: crop_flip, size: {{name: step, start: 12, milestones: [11 steps], values: [16]}}}}
backbone:
  name: vit_tiny_patch16_224
  size: 16
  options: {{patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2, proj_drop_rate: 0.1}}
method: {{name: mae, decoder_dim: 16, decoder_depth: 1, decoder_heads: 2}}
optim: {{lr: 1.0e-3, schedule: {{name: cosine, warmup: 4 steps}}}}
engine: {{precision: fp32}}
evaluate: {{knn: {{every: 8 steps}}}}
monitor: {{limit: 64, pictures: null}}
checkpoint: {{every: 5 steps}}
tracking: {{enabled: false, every: 3 steps}}
"""

FINETUNE = """
name: run
duration: 24 steps
batch: 32
batch_growth: 2
data: {{train: {digits}/train, val: {digits}/val, workers: 0, ledger: true, labels: 60%, repeats: 2}}
augment:
  {{name: standard, policy: none, erase: 0.25, size: {{name: step, start: 8, milestones: [8 steps], values: [16]}}}}
backbone:
  name: vit_tiny_patch16_224
  size: 16
  options: {{patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}}
  pool: avg
head: {{norm: batch}}
loss: {{smoothing: 0.1}}
mix: {{mixup: 0.8, cutmix: 1.0, mode: sample, off_for_last: 4 steps}}
drop: {{path: {{name: linear, start: 0.05, end: 0.2}}, proj: 0.1}}
transfer: {{name: gradual, at: [3 steps, 6 steps]}}
optim: {{lr: 2.0e-3, layer_decay: 0.7, schedule: {{name: one_cycle}}}}
engine: {{precision: fp32, clip: 1.0, sam: {{every: 3}}}}
average: {{name: ema, decay: 0.9}}
measure: {{every: 8 steps}}
monitor: {{pictures: null}}
checkpoint: {{every: 5 steps}}
tracking: {{enabled: false, every: 3 steps}}
"""


def start(
    folder: Path, recipe: Path, *overrides: str, procs: int = 2, stage: str = "pretrain", **environment: str
) -> subprocess.Popen[str]:
    """A run under the launcher, in a process group of its own."""
    command = [
        sys.executable,
        "-m",
        "launch",
        "local",
        "--procs",
        str(procs),
        "--threads",
        "1",
        stage,
        str(recipe),
    ]
    return subprocess.Popen(
        [*command, f"out={folder}", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def finish(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return process.returncode, output


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str], timeout: float = 120) -> None:
    """Until some rank's ledger holds the step."""
    began = time.monotonic()
    while time.monotonic() - began < timeout and process.poll() is None:
        for file in folder.glob("ledger/*.jsonl"):
            if f'"step": {step},' in file.read_text():
                return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {finish(process)[1]}")


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 of the launcher, torchrun, every rank and its workers; torchrun gives its ranks sessions of their own."""
    family = psutil.Process(process.pid).children(recursive=True)
    for one in [psutil.Process(process.pid), *family]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.communicate()
    psutil.wait_procs(family, timeout=10)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks."""
    family = psutil.Process(process.pid).children(recursive=True)
    return [one.pid for one in family if "torch.distributed.run" not in one.cmdline() and "pretrain" in one.cmdline()]


def history(folder: Path) -> dict[tuple[str, int], float]:
    """Every metric of a run but those that time decides."""
    found: dict[tuple[str, int], Any] = {}
    for line in (folder / "journal.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.get("metrics", {}).items():
            assert (name, record["step"]) not in found, f"{name} stands twice at step {record['step']}"
            found[name, record["step"]] = value
    return {key: value for key, value in found.items() if not key[0].startswith("perf/")}
