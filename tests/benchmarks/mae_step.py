"""The MAE ViT-B/16 training step beside the reference implementation's, in bf16 autocast, optimizer included.

    git clone https://github.com/facebookresearch/mae DIR
    python -m tests.benchmarks.mae_step --reference DIR

Each contender lives in a process of its own (so that its peak memory is its own), and they take turns: a round is a few
steps of each, and the rates of a round are compared with each other. The reference runs as its engine_pretrain.py does
(gradient norm and the look at the loss included), with bf16 in place of fp16 and its loss scale; ours runs through the
Engine as in training, from uint8 images, which the reference is given normalised.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.benchmarks._report import print_facts, print_table

SIZE = 224
ANCHOR = "reference"
# name: (whose, torch.compile, fused AdamW); the plain ones are what is used in training.
CONTENDERS = {
    ANCHOR: ("reference", False, False),
    "reference, fused, compiled": ("reference", True, True),
    "penstock": ("penstock", False, True),
    "penstock, compiled": ("penstock", True, True),
}
Step = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.mae_step", description=__doc__.partition("\n")[0])
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of facebookresearch/mae")
    parser.add_argument("--device", choices=("cpu", "cuda"), nargs="+", help="the CPU, and the GPU where there is one")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=None, help="steps in a round; 2 on a CPU and 20 on a GPU")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, metavar="CONTENDER")
    args = parser.parse_args()
    print_facts()
    for device in args.device or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]):
        _compare(device, args, args.steps or (20 if device == "cuda" else 2))


def _compare(device: str, args: argparse.Namespace, steps: int) -> None:
    context = get_context("spawn")
    lines: dict[str, Connection] = {}
    processes = []
    for name in args.only:
        lines[name], far = context.Pipe()
        processes.append(
            context.Process(target=_contend, args=(far, name, device, args.batch, args.reference), daemon=True)
        )
        processes[-1].start()
        far.close()
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    ends: dict[str, dict[str, float]] = {}
    first = {name: _ask(line, 1)["seconds"] for name, line in lines.items()}
    for _ in range(args.rounds):
        for name, line in lines.items():
            ends[name] = _ask(line, steps)
            seconds[name].append(ends[name]["seconds"] / steps)
    for line in lines.values():
        line.send(0)
    for process in processes:
        process.join(timeout=30)
    anchor = ANCHOR if ANCHOR in seconds else args.only[0]
    rows = []
    for name, times in seconds.items():
        ratio = statistics.median(theirs / ours for ours, theirs in zip(times, seconds[anchor], strict=True))
        speeds = [f"{args.batch / take(times):.2f}" for take in (statistics.median, min)]
        memory = f"{ends[name]['memory'] / 1e9:.2f} GB"
        rows.append([name, *speeds, f"{ratio:.2f} x", memory, f"{first[name]:.1f} s", f"{ends[name]['loss']:.4f}"])
    title = (
        f"MAE ViT-B/16 step, {SIZE} x {SIZE}, batch {args.batch}, bf16, {device}; {args.rounds} rounds of {steps} steps"
    )
    print_table(title, ["", "images/s", "best", "ratio", "peak memory", "first step", "loss"], rows)


def _ask(line: Connection, steps: int) -> dict[str, float]:
    line.send(steps)
    try:
        return line.recv()
    except EOFError:
        raise SystemExit("a contender ended early; its error stands above") from None


def _contend(line: Connection, name: str, device: str, batch: int, checkout: Path) -> None:
    """A contender's process: so many steps for each number that comes in, until it is 0."""
    if device == "cpu":
        torch.cuda.is_available = lambda: False
    whose, compiled, fused = CONTENDERS[name]
    torch.manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8)
    make = _penstock if whose == "penstock" else _reference
    step = make(images, torch.device(device), compiled, fused, checkout)
    while steps := line.recv():
        began = time.perf_counter()
        for _ in range(steps):
            loss = step()
        if device == "cuda":
            torch.cuda.synchronize()
        line.send({"seconds": time.perf_counter() - began, "memory": _peak(device), "loss": loss})


def _penstock(images: torch.Tensor, device: torch.device, compiled: bool, fused: bool, _: Path) -> Step:
    from penstock.backbones import Backbone
    from penstock.engine import Engine, start_ranks
    from penstock.optim import Optim
    from penstock.streams.batch import Batch
    from pretrain.methods.mae import MAE

    start_ranks()
    batch = len(images)
    task = MAE(MAE.Config(), Backbone(Backbone.Config(name="vit_base_patch16_224")), seed=0)
    optim = Optim(Optim.Config(lr=1.5e-4, betas=(0.9, 0.95), options={"fused": fused}))
    engine = Engine(task, optim.build(task, batch), Engine.Config(precision="bf16", compile=compiled), batch)
    knobs = {"lr": 1.5e-4, "weight_decay": 0.05, "mask_ratio": 0.75}
    labels, weights, positions = torch.full((batch,), -1), torch.ones(batch), torch.arange(batch)

    def step() -> float:
        sent = Batch([images], labels, weights, positions).to(device)
        engine.set(knobs)
        engine.begin(weights.sum())
        output = engine.forward(sent, knobs)
        engine.backward(output)
        engine.step()
        return output.loss.item()

    return step


def _reference(images: torch.Tensor, device: torch.device, compiled: bool, fused: bool, checkout: Path) -> Step:
    models, norm_of = _import_reference(checkout)
    model = models.mae_vit_base_patch16(norm_pix_loss=True).to(device)
    from timm.optim import param_groups_weight_decay

    groups = param_groups_weight_decay(model, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=1.5e-4, betas=(0.9, 0.95), fused=fused or None)
    if compiled:
        model.compile()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (images / 255 - mean[:, None, None]) / std[:, None, None]

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16):
            loss, _, _ = model(normalised.to(device), mask_ratio=0.75)
        value = loss.item()
        if not math.isfinite(value):
            raise SystemExit(f"the reference's loss is {value}")
        loss.backward()
        norm_of(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step


def _import_reference(checkout: Path) -> tuple[Any, Callable[[Any], torch.Tensor]]:
    """The checkout's models and its gradient norm. It is older than NumPy 1.24, torch 2.0 and timm 0.9."""
    import numpy as np
    import timm.models.vision_transformer as vision_transformer

    np.float = float  # type: ignore[attr-defined]
    sys.modules["torch._six"] = SimpleNamespace(inf=math.inf)  # type: ignore[assignment]
    modern: Any = vision_transformer.Block
    vision_transformer.Block = lambda *args, qk_scale=None, **rest: modern(*args, **rest)  # type: ignore[misc,assignment]
    sys.path.insert(0, str(checkout))
    import models_mae
    from util.misc import get_grad_norm_

    return models_mae, get_grad_norm_


def _peak(device: str) -> float:
    """Bytes: of the GPU's allocator, or the largest resident set of this process so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main()
