"""A rank loads what it needs for its first step, a check what it needs to check: nothing that takes seconds beside."""

import subprocess
import sys

import pytest

from tests.shards import write_set

HEAVY = ("mlflow", "pandas", "sklearn", "matplotlib", "torchmetrics", "pyarrow", "torch._inductor", "peft")
RANK = f"""
import sys
import pretrain.run
import finetune.run
from penstock.engine_start import import_deepspeed, start_ranks
import torch
start_ranks()
import_deepspeed(torch.device("cpu"))
print("loaded:", [name for name in {HEAVY} if name in sys.modules])
import mlflow  # whoever needs it later still gets it
"""
# A login node checks recipes: there torch is the only large import. torch._dynamo alone doubles the time.
HEAVY_TO_CHECK = (*HEAVY, "timm", "deepspeed", "transformers", "torchvision", "torch._dynamo")
CHECK = f"""
import runpy, sys
stage, sys.argv = sys.argv[1], sys.argv[1:]
try:
    runpy.run_module(stage, run_name="__main__")
except SystemExit as end:
    print("code:", end.code)
print("loaded:", [name for name in {HEAVY_TO_CHECK} if name in sys.modules])
"""


def said(source: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", source, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_rank_loads_no_heavy_package_it_does_not_use():
    assert "loaded: []" in said(RANK)


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("pretrain", ["method={name: mae}"]),
        (
            "finetune",
            ["transfer=lora", "loss=binary", "drop.path=0.1", "mix.mixup=0.2", "average.name=ema"],
        ),
    ],
)
def test_a_check_loads_no_heavy_package(stage, more, tmp_path):
    write_set(tmp_path / "set", [3])
    recipe = tmp_path / "recipe.yaml"
    data = f"data: {{train: {tmp_path}/set, val: {tmp_path}/set}}"
    backbone = "backbone: {name: vit_tiny_patch16_224}"
    lines = (
        "name: run",
        "duration: 2 steps",
        "batch: 2",
        data,
        backbone,
        "augment: {name: standard}",
        "optim: {lr: 0.1}",
    )
    recipe.write_text("\n".join(lines))
    found = said(CHECK, stage, str(recipe), "--check", *more)
    assert "good" in found and "code: 0" in found and "loaded: []" in found, found
