"""A distilled student's training with its teacher running, beside the same with the teacher's answers cached.

    python -m tests.benchmarks.cached_teacher RECIPE CACHE [key=value ...]

RECIPE is the student's, CACHE what `python -m finetune.teacher` made for it. Both sides see the same images in the same
order and take whole steps: reading, augmenting, student forward and backward, AdamW. They take turns, a round being a
few steps of each, and images per second of wall time are compared; their losses on the way, too.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from finetune.recipe import Finetune
from finetune.run import Finetuning
from penstock.assembly import INIT
from penstock.augment import AUGMENTATIONS
from penstock.keyed import key
from penstock.recipe import check, load
from penstock.schedule import Clock, value_at
from penstock.streams.data import Data
from penstock.streams.train import TrainStream
from tests.benchmarks._report import print_facts, print_table


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.cached_teacher", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("cache", type=Path, metavar="CACHE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=10, help="of each side in a round (10)")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_intermixed_args()
    print_facts()
    sides = {"online": _steps(args, "null"), "cached": _steps(args, str(args.cache))}
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(args.rounds + 1):  # the first warms up
        for side, steps in sides.items():
            began = time.perf_counter()
            images = 0
            for _ in range(args.steps):
                count, loss = next(steps)
                images += count
                losses[side].append(loss)
            if number:
                speeds[side].append(images / (time.perf_counter() - began))
    ratio = statistics.median(b / a for a, b in zip(speeds["online"], speeds["cached"], strict=True))
    rows = [[side, f"{statistics.median(s):.0f}", f"{min(s):.0f} to {max(s):.0f}"] for side, s in speeds.items()]
    print_table(
        f"{args.recipe}: medians of {args.rounds} rounds of {args.steps} steps",
        ["teacher", "images/s", "range"],
        [*rows, ["ratio", f"{ratio:.2f} x", ""]],
    )
    apart = [abs(a - b) for a, b in zip(*losses.values(), strict=True)]
    print(f"losses apart: {apart[0]:.1e} in the first step, {max(apart):.1e} at most in {len(apart)} steps")


def _steps(args: argparse.Namespace, cache: str) -> Iterator[tuple[int, float]]:
    """Images and loss of each step."""
    recipe: Any = check(Finetune, load(args.recipe, [*args.overrides, f"task.cache={cache}"]))
    stage, data = Finetuning(recipe), Data(recipe.data, recipe.seed)
    clock = Clock.of(recipe.duration, recipe.batch, data.part.samples)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(key(recipe.seed, INIT))
    task = stage.task(data, clock).to(device)
    stream = TrainStream(
        recipe.data,
        AUGMENTATIONS.get(recipe.augment.name)(recipe.augment),
        batch=recipe.batch,
        accumulation=1,
        rank=0,
        world=1,
        seed=recipe.seed,
        clock=clock,
        device_type=device.type,
        size_multiple=task.backbone.size_multiple,
        sidecar=stage.sidecar(data),
    )
    optimizer = torch.optim.AdamW([param for param in task.parameters() if param.requires_grad], lr=1e-4)
    knobs = {name: value_at(knob, 0, clock) for name, knob in stage.knobs().items()}
    task.before_step(0, knobs)
    for batch in stream.batches(0):
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.engine.precision == "bf16"):
            output = task(batch.to(device), knobs)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        yield len(batch), float(output.loss.detach())


if __name__ == "__main__":
    main()
