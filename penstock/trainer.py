"""The one training loop."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from penstock import distributed, keyed
from penstock.checkpoint import Checkpoints
from penstock.ema import Average
from penstock.engine import Engine
from penstock.errors import RunFailed
from penstock.meters import Meters
from penstock.progress import progress
from penstock.schedule import Clock, Curves, Tick
from penstock.signals import Stop
from penstock.streams.batch import Batch
from penstock.streams.faults import FaultLog
from penstock.streams.positions.digest import digest_of
from penstock.streams.positions.ledger import Ledger
from penstock.streams.train import TrainStream
from penstock.tracking import Tracker

DROPOUT = 0x0D120  # the stream of random numbers that the model's own draws come from


@dataclass
class State:
    """Where a run is. Data moves with `samples`, curves with `applied`."""

    step: int = 0  # optimizer steps taken, those that were skipped as not finite included
    applied: int = 0  # samples of the steps that moved the weights
    samples: int = 0  # position in the endless order of samples
    skipped: int = 0  # steps skipped in a row
    ended: bool = False  # before the clock's end, as nothing got better


class Observer(Protocol):
    """Evaluations, pictures; what `Monitor` does."""

    def observe(self, tick: Tick) -> bool:
        """Called at the start and after each step, twice after a last one that it calls the last; True ends the run."""
        ...

    def ended(self) -> bool:
        """Whether a resumed run that ended early is still to end there."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


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
    monitor: Observer
    meters: Meters
    average: Average | None = None


def fit(run: Run) -> tuple[bool, int]:
    """Train until the clock's end, from the newest checkpoint if there is one.

    Returns whether it came to the end, or was asked to stop before, and the optimizer steps taken.
    """
    engine, clock, meters = run.engine, run.clock, run.meters
    state, books = _restore(run)
    batches = run.stream.batches(state.samples, state.step)
    tick = clock.tick(state.step, state.samples, ended=state.ended)
    if tick.first or tick.last:  # what was due at another step was done before its checkpoint
        run.monitor.observe(tick)
    with progress("training", clock.samples, state.samples, show=distributed.is_main()) as bar:
        while not tick.last:
            size = run.stream.batch_at(state.samples)
            knobs = run.curves.at(state.applied / clock.batch, size)
            engine.set(knobs, tick.now)
            engine.task.before_step(tick.now, knobs)
            began = time.monotonic()
            parts = [next(batches) for _ in range(engine.accumulation)]
            waited = time.monotonic() - began
            engine.begin(torch.stack([part.weights.sum() for part in parts]).sum(), run.stop.asked())
            for sweep in engine.sweeps(state.step):
                torch.manual_seed(keyed.key(run.seed, DROPOUT, state.step, distributed.rank()))
                for part in parts:
                    output = engine.forward(part.to(engine.device), knobs)
                    engine.backward(output)
                    if sweep == 0:
                        meters.output(output)
                        meters.made(part)
            done = engine.step()
            if done.applied:
                engine.task.after_step(engine, knobs)
            meters.step(done.applied, size, waited, grad_norm=done.grad_norm)
            _advance(state, run, parts, size, done.applied)
            tick = clock.tick(state.step, state.samples, state.samples - size)
            if done.applied and run.average is not None:
                run.average.update(engine, tick)
            books.close_step(parts, state, tick)
            if tick.every(run.report_every) or tick.last or state.step == 1:
                bar.note(_report(run, state, size, knobs))
            with meters.paused():
                if not tick.last and run.monitor.observe(tick):
                    state.ended, tick = True, replace(tick, ended=True)
                if tick.last:
                    run.monitor.observe(tick)
                if done.stop or tick.last or tick.every(run.checkpoints.config.every):
                    _save(run, state, books, tick)
            bar.advance(size)
            if done.stop and not tick.last:
                return False, state.step
    return True, state.step


def _advance(state: State, run: Run, parts: list[Batch], size: int, applied: bool) -> None:
    """The position moves with the optimizer step, never with the prefetcher."""
    state.step += 1
    state.samples += size
    state.applied += size if applied else 0
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


def _report(run: Run, state: State, size: int, knobs: dict[str, float]) -> str:
    means, speed = run.meters.report()
    shown = run.stream.knobs_at(state.samples - size)
    knobs = knobs | {"batch": size, **{f"augment_{name}": value for name, value in shown.items()}}
    values = {f"train/{name}": value for name, value in knobs.items()} | means | speed
    values |= run.stream.course.shares_of(state.samples - size, state.samples)
    values |= {"progress/samples": state.samples, "progress/epoch": state.samples / run.stream.samples_per_epoch}
    run.tracker.log(state.step, values)
    return f"loss {means.get('train/loss', float('nan')):.4f}  {speed['perf/images_per_second']:.0f} images/s"


class Books:
    """What is written down about the samples served: the ledger, the epochs' digests, the unreadable ones."""

    def __init__(self, run: Run, state: State):
        self._run, config = run, run.stream.config
        self.digest = digest_of(run.stream.course, state.samples)
        self.faults = FaultLog(run.folder, config.max_bad)
        self.ledger = Ledger(run.folder / "ledger", state.step) if config.ledger else None

    def close_step(self, parts: list[Batch], state: State, tick: Tick) -> None:
        for part in parts:
            self.digest.add(part)
            self.faults.add(part)
        if self.ledger:
            self.ledger.append(parts)
        for epoch in self.digest.done(state.samples):
            self._run.tracker.event("epoch", state.step, **epoch, digest="as in the manifest")
        if tick.every(self._run.report_every) or tick.last:
            self.judge(state)

    def judge(self, state: State) -> None:
        """Count the samples that could not be read over all ranks, and end the run where they are too many."""
        bad = self.faults.check()
        if bad:
            kinds = {f"data/unreadable_{kind}": count for kind, count in self.faults.kinds.items() if count}
            self._run.tracker.log(state.step, {"data/unreadable": bad, **kinds})
        if self.faults.dropped:
            self._run.tracker.log(state.step, {"data/dropped": self.faults.dropped})


def _save(run: Run, state: State, books: Books, tick: Tick) -> None:
    books.judge(state)  # a stop or an early end comes between reports, and a resumed run counts anew
    step = state.step
    forever = tick.every(run.checkpoints.config.keep_every)
    run.tracker.flush()
    about = {
        "run": asdict(state),
        "stream": run.stream.identity,
        "batch": run.stream.batch,
        "digest": books.digest.state(),
        "monitor": run.monitor.state(),
    }
    trouble = run.checkpoints.save(run.engine, step, about, run.meters.state(), forever, run.average)
    if trouble:
        run.tracker.event("checkpoint failed", step, why=trouble)
        if distributed.is_main():
            print(
                f"warning: no checkpoint at step {step}: {trouble}; the one before is kept, training goes on",
                flush=True,
            )


def _restore(run: Run) -> tuple[State, Books]:
    open_sums: dict[str, torch.Tensor] = {}
    saved, warnings = run.checkpoints.restore(run.engine, open_sums, run.average)
    for warning in warnings:
        run.tracker.event("checkpoint damaged", 0, why=warning)
        if distributed.is_main():
            print(f"warning: {warning}; the one before is used", flush=True)
    if saved is None:
        run.tracker.event("started", 0, samples=0, ranks_now=distributed.world())
        return (state := State()), Books(run, state)
    run.stream.check_identity(saved["stream"])
    state = State(**saved["run"])
    books = Books(run, state)
    books.digest.load(saved["digest"])
    run.meters.load(open_sums)
    run.monitor.load(saved["monitor"])
    state.ended = state.ended and run.monitor.ended()
    ranks = {"ranks_then": saved["world"], "ranks_now": distributed.world()}
    run.tracker.event("resumed", state.step, samples=state.samples, **ranks)
    if distributed.is_main():
        done = min(state.samples / run.clock.samples, 1.0)
        print(f"resuming at step {state.step}, {done:.0%} of the run", flush=True)
    return state, books
