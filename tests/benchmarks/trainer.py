"""The trainer beside a bare loop over the same model and tensors, in one process.

    python -m tests.benchmarks.trainer

The bare loop is forward, backward and optimizer step in plain torch. The trainer is `fit` as in training, through the
engine, with metrics every 10 steps, the journal, the mirror to a local MLflow store and checkpoints. Both see the same
tensors, without a data loader. They take turns in blocks of steps, since the machine's speed drifts; the turns of the
trainer count everything between two optimizer steps. Checkpoints fall into few turns: "all turns" holds them.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from penstock.backbones import Backbone
from penstock.checkpoint import Checkpoints
from penstock.engine import Engine, start_ranks
from penstock.meters import Meters
from penstock.optim import Optim
from penstock.schedule import Clock, Curves, Length, Tick
from penstock.signals import Stop
from penstock.streams.batch import Batch
from penstock.streams.positions.mixture_order import Course, Served
from penstock.tracking import Tracker
from penstock.trainer import Run, fit
from pretrain.methods.mae import MAE
from tests.benchmarks._report import print_facts, print_table

BACKBONE = Backbone.Config(name="vit_tiny_patch16_224", size=96, options={"patch_size": 8})
KNOBS = {"lr": 1e-4, "weight_decay": 0.05, "mask_ratio": 0.75}
GOAL = 0.03


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.trainer", description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=64, help="the default gives a step of more than 100 ms on a CPU")
    parser.add_argument("--steps", type=int, default=200, help="steps of each contender")
    parser.add_argument("--block", type=int, default=10, help="steps in a turn")
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    args = parser.parse_args()
    print_facts()
    start_ranks()
    batch = _batch(args.batch)
    bare, blocks = _bare_loop(batch), args.steps // args.block
    wall: dict[str, list[float]] = {"bare loop": [], "trainer": []}
    cpu: dict[str, list[float]] = {"bare loop": [], "trainer": []}
    mark = [0.0, 0.0]

    def note(name: str) -> None:
        now = [time.perf_counter(), time.process_time()]
        wall[name].append((now[0] - mark[0]) / args.block)
        cpu[name].append((now[1] - mark[1]) / args.block)

    def take_turns(tick: Tick) -> bool:
        """Called by the trainer after each step: at the end of its block, the bare loop runs one."""
        if tick.step % args.block == 0:
            if tick.step:
                note("trainer")
            mark[:] = [time.perf_counter(), time.process_time()]
            for _ in range(args.block):
                bare()
            note("bare loop")
            mark[:] = [time.perf_counter(), time.process_time()]
        return False

    monitor = SimpleNamespace(observe=take_turns, state=dict)

    with tempfile.TemporaryDirectory(prefix="penstock-trainer-") as folder:
        run = _run(batch, Path(folder) / "run", blocks * args.block, args.checkpoint_every, monitor)
        fit(run)
        run.tracker.close("FINISHED")
    rows = []
    for name in wall:
        cells = [name]
        for times in (wall, cpu):
            mine, bare_times = times[name][1:], times["bare loop"][1:]  # the first turn warms up
            ratios = [one / other for one, other in zip(mine, bare_times, strict=False)]
            usual, all_in_all = statistics.median(ratios), statistics.mean(mine) / statistics.mean(bare_times)
            cells += [
                f"{1000 * statistics.median(mine):.1f} ms",
                f"{100 * usual - 100:+.1f} %",
                f"{100 * all_in_all - 100:+.1f} %",
            ]
        rows.append(cells)
    every = f"metrics every 10 steps, a checkpoint every {args.checkpoint_every}"
    title = f"A step of batch {args.batch}; {every}; at most {100 * GOAL:.0f} % over the bare loop is the goal"
    print_table(title, ["", "step", "usual turn", "all turns", "CPU time", "usual turn", "all turns"], rows)


def _batch(size: int) -> Batch:
    pixels = torch.randint(0, 256, (size, 3, *BACKBONE.height_width), dtype=torch.uint8)
    numbers = torch.arange(size)
    return Batch([pixels], torch.full((size,), -1), torch.ones(size), numbers, ["key"] * size, ids=numbers)


def _task() -> MAE:
    torch.manual_seed(0)
    return MAE(MAE.Config(decoder_dim=192, decoder_depth=2, decoder_heads=3), Backbone(BACKBONE), seed=0)


def _bare_loop(batch: Batch) -> Any:
    task = _task()
    optimizer = Optim(Optim.Config(lr=1e-4)).build(task, len(batch))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = task(batch, KNOBS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _run(batch: Batch, folder: Path, steps: int, checkpoint_every: int, monitor: Any) -> Run:
    task = _task()
    engine = Engine(task, Optim(Optim.Config(lr=1e-4)).build(task, len(batch)), Engine.Config(), len(batch))
    folder.mkdir(parents=True)
    config = Tracker.Config(uri=f"sqlite:///{folder.parent}/mlflow.db")
    tracker = Tracker(config, folder, "trainer", {}, {}, active=True)
    clock = Clock(total=steps, batch=len(batch), epoch=steps * len(batch))
    checkpoints = Checkpoints(Checkpoints.Config(every=Length(checkpoint_every, "steps")), folder)
    return Run(
        engine=engine,
        stream=_Tensors(batch, steps),  # type: ignore[arg-type]
        curves=Curves(KNOBS, clock),
        clock=clock,
        tracker=tracker,
        report_every=config.every,
        checkpoints=checkpoints,
        folder=folder,
        seed=0,
        stop=Stop(folder),
        monitor=monitor,
        meters=Meters(),
    )


class _Tensors:
    """In place of a stream of shards: the same batch for ever."""

    def __init__(self, batch: Batch, steps: int):
        self.batch, self._batch = len(batch), batch
        self.samples_per_epoch = steps * len(batch)
        self.identity: dict[str, Any] = {}
        self.config = SimpleNamespace(ledger=False, max_bad=0.001)
        part: Any = SimpleNamespace(round=self.samples_per_epoch * 2, repeats=1)
        self.course = Course([Served("", part, part, part, 0)])

    def batch_at(self, position: int) -> int:
        return self.batch

    def knobs_at(self, position: int) -> dict[str, float]:
        return {}

    def batches(self, since: int, step: int) -> Iterator[Batch]:
        while True:
            yield self._batch


if __name__ == "__main__":
    main()
