"""A real ablation: stopped in its first run, gone on with, and shown in MLflow as a parent with children."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.series import resolve
from penstock.tracking import process
from penstock.tracking.mirror import open_store
from tests.runs.runner import kill
from tests.trees import class_tree, packed

RECIPE = """
name: tiny
duration: 12 steps
batch: 8
data: {{train: {data}, val: {data}, workers: 0}}
augment: {{name: none, size: 16}}
backbone:
  name: vit_tiny_patch16_224
  size: 16
  options: {{patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}}
mix: {{mixup: 0.8}}
optim: {{lr: 1.0e-3}}
engine: {{precision: fp32}}
monitor: {{pictures: null}}
tracking: {{every: 1 steps, enabled: {mirrored}}}
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    packed(class_tree(tmp_path / "images", each=8), tmp_path / "packed")
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(data=tmp_path / "packed", mirrored="false"))
    return path


def test_recipes_are_resolved_where_torch_may_be_imported(recipe):
    on, off, wrong = resolve(str(recipe), [[], ["mix.mixup=0"], ["mix.mixpu=0"]])
    assert isinstance(on, dict) and isinstance(off, dict) and isinstance(wrong, str)
    assert (on["mix"]["mixup"], off["mix"]["mixup"]) == (0.8, 0)
    assert "mixup" in wrong


@pytest.mark.slow
def test_stopped_resumed_and_shown(recipe, tmp_path):
    runs = tmp_path / "runs"
    folder = runs / "tiny-ablation"

    def start() -> subprocess.Popen[str]:
        words = [str(recipe), "--over", "mixup", "--seeds", "1", "--procs", "1", "--threads", "1", f"out={runs}"]
        return subprocess.Popen(
            [sys.executable, "-m", "launch", "ablate", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )

    first, journal, until = start(), folder / "full-seed0" / "journal.jsonl", time.monotonic() + 120
    while not (journal.is_file() and '"step":2,' in journal.read_text()):
        assert first.poll() is None and time.monotonic() < until, kill(first)
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 75, said

    second = start()
    said, _ = second.communicate(timeout=240)
    assert second.returncode == 0, said
    report = json.loads((folder / "report.json").read_text())
    assert [run["run"] for run in report["runs"]] == ["full-seed0", "without-mixup-seed0"]
    assert report["images"] == 24

    ids = {path.name: process.sync(path) for path in (folder / "full-seed0", folder, folder / "without-mixup-seed0")}
    client = open_store(f"sqlite:///{runs / 'mlflow.db'}")
    for child in ("full-seed0", "without-mixup-seed0"):
        assert client.get_run(ids[child]).data.tags["mlflow.parentRunId"] == ids[folder.name]
    shown = {each.path for each in client.list_artifacts(ids[folder.name])}
    assert {"report.json", "effects.png"} <= shown
