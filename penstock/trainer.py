"""The one training loop."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from penstock import distributed, keyed
from penstock.checkpoint import Checkpoints
from penstock.engine import Engine
from penstock.errors import RunFailed
from penstock.meters import Meters
from penstock.progress import progress
from penstock.schedule import Clock, Curves
from penstock.signals import Stop
from penstock.streams.batch import Batch
from penstock.streams.digest import EpochDigest
from penstock.streams.faults import FaultLog
from penstock.streams.ledger import Ledger
from penstock.streams.train import TrainStream
from penstock.tracking import Tracker

DROPOUT = 0x0D120  # the stream of random numbers that the model's own draws come from


@dataclass
class State:
    """Where a run is. Data moves with `samples`, curves with `applied`."""

    step: int = 0  # optimizer steps taken, those that were skipped as not finite included
    applied: int = 0  # steps that moved the weights
    samples: int = 0  # position in the endless order of samples
    skipped: int = 0  # steps skipped in a row


@dataclass
class Run:
    """The parts of a run, put together by the stage."""

    engine: Engine
    stream: TrainStream
    curves: Curves
    clock: Clock
    tracker: Tracker
    report_every: Any
    checkpoints: Checkpoints
    folder: Path
    seed: int
    stop: Stop
    observe: Callable[[int], None]  # evaluations, pictures: called at the start and after each step
    meters: Meters


def fit(run: Run) -> bool:
    """Train until the clock's end, from the newest checkpoint if there is one. False when asked to stop before."""
    engine, clock, meters = run.engine, run.clock, run.meters
    state, books = _restore(run)
    batches = run.stream.batches(state.samples, state.step)
    if state.step in (0, clock.total):  # what was due at another step was done before its checkpoint
        run.observe(state.step)
    with progress("training", clock.total, state.step, show=distributed.is_main()) as bar:
        while state.step < clock.total:
            torch.manual_seed(keyed.key(run.seed, DROPOUT, state.step, distributed.rank()))
            knobs = run.curves.at(state.applied)
            engine.set(knobs)
            began = time.monotonic()
            parts = [next(batches) for _ in range(engine.accumulation)]
            waited = time.monotonic() - began
            engine.begin(torch.stack([part.weights.sum() for part in parts]).sum(), run.stop.asked())
            for part in parts:
                output = engine.forward(part.to(engine.device), knobs)
                engine.backward(output)
                meters.output(output)
            done = engine.step()
            if done.applied:
                engine.task.after_step(engine, knobs)
            meters.step(done.applied, run.stream.batch, waited, grad_norm=done.grad_norm)
            _advance(state, run, parts, done.applied)
            books.close_step(parts, state)
            if clock.every(run.report_every, state.step) or state.step in (1, clock.total):
                bar.note(_report(run, state, knobs))
            with meters.paused():
                run.observe(state.step)
                last = done.stop or state.step == clock.total
                if last or clock.every(run.checkpoints.config.every, state.step):
                    _save(run, state, books)
            bar.advance()
            if done.stop and state.step < clock.total:
                return False
    return True


def _advance(state: State, run: Run, parts: list[Batch], applied: bool) -> None:
    """The position moves with the optimizer step, never with the prefetcher."""
    state.step += 1
    state.samples += run.stream.batch
    state.applied += applied
    state.skipped = 0 if applied else state.skipped + 1
    if not applied:
        keys = [key for rank in distributed.collect([key for part in parts for key in part.keys]) for key in rank]
        run.tracker.event("skipped", state.step, keys=keys)
        if state.skipped >= run.engine.config.max_skipped:
            raise RunFailed(
                f"the loss or gradient was not finite in {state.skipped} steps in a row, the last at step {state.step}"
                f"; its samples: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''} (all in the journal). "
                "Try a lower optim.lr, a longer warm-up, engine.clip=1.0 or engine.precision=fp32"
            )


def _report(run: Run, state: State, knobs: dict[str, float]) -> str:
    means, speed = run.meters.report()
    values = {f"train/{name}": value for name, value in knobs.items()} | means | speed
    values |= {"progress/samples": state.samples, "progress/epoch": state.samples / run.stream.samples_per_epoch}
    run.tracker.log(state.step, values)
    return f"loss {means.get('train/loss', float('nan')):.4f}  {speed['perf/images_per_second']:.0f} images/s"


class Books:
    """What is written down about the samples served: the ledger, the epochs' digests, the unreadable ones."""

    def __init__(self, run: Run, state: State):
        self._run, config = run, run.stream.config
        self.digest = EpochDigest(run.stream.manifest, state.samples)
        self.faults = FaultLog(run.folder, config.max_bad)
        self.ledger = Ledger(run.folder / "ledger", state.step) if config.ledger else None

    def close_step(self, parts: list[Batch], state: State) -> None:
        for part in parts:
            self.digest.add(part)
            self.faults.add(part)
        if self.ledger:
            self.ledger.append(parts)
        for epoch in self.digest.check(state.samples):
            self._run.tracker.event("epoch", state.step, epoch=epoch, digest="as in the manifest")
        run = self._run
        if run.clock.every(run.report_every, state.step):
            bad = self.faults.check()
            if bad:
                run.tracker.log(state.step, {"data/unreadable": bad})


def _save(run: Run, state: State, books: Books) -> None:
    config, step = run.checkpoints.config, state.step
    forever = config.keep_every is not None and run.clock.every(config.keep_every, step)
    run.tracker.flush()
    about = {
        "run": asdict(state),
        "stream": run.stream.identity,
        "batch": run.stream.batch,
        "digest": books.digest.state(),
    }
    trouble = run.checkpoints.save(run.engine, step, about, run.meters.state(), forever)
    if trouble:
        run.tracker.event("checkpoint failed", step, why=trouble)
        if distributed.is_main():
            print(
                f"warning: no checkpoint at step {step}: {trouble}; the one before is kept, training goes on",
                flush=True,
            )


def _restore(run: Run) -> tuple[State, Books]:
    open_sums: dict[str, torch.Tensor] = {}
    saved, warnings = run.checkpoints.restore(run.engine, open_sums)
    for warning in warnings:
        run.tracker.event("checkpoint damaged", 0, why=warning)
        if distributed.is_main():
            print(f"warning: {warning}; the one before is used", flush=True)
    if saved is None:
        return (state := State()), Books(run, state)
    run.stream.check_identity(saved["stream"])
    state = State(**saved["run"])
    books = Books(run, state)
    books.digest.load(saved["digest"])
    run.meters.load(open_sums)
    run.tracker.event("resumed", state.step, ranks_then=saved["world"], ranks_now=distributed.world())
    if distributed.is_main():
        print(f"resuming at step {state.step} of {run.clock.total}", flush=True)
    return state, books
