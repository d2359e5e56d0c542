"""A rank loads what it needs for its first step, and nothing that takes seconds beside it."""

import subprocess
import sys

HEAVY = ("mlflow", "pandas", "sklearn", "matplotlib", "torchmetrics", "pyarrow", "torch._inductor")
RANK = f"""
import sys
import pretrain.run
from penstock.engine_start import import_deepspeed, start_ranks
import torch
start_ranks()
import_deepspeed(torch.device("cpu"))
print("loaded:", [name for name in {HEAVY} if name in sys.modules])
import mlflow  # whoever needs it later still gets it
"""


def test_a_rank_loads_no_heavy_package_it_does_not_use():
    done = subprocess.run([sys.executable, "-c", RANK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loaded: []" in done.stdout, done.stdout
