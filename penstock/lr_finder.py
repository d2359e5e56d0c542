"""The learning-rate range test (Smith 2017): the rate grows exponentially, and the loss says where it is good.

It trains on the real stream through the real engine, and then puts back every weight, buffer and state of the optimizer
and the random numbers, bit for bit.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock import distributed, keyed
from penstock.engine import Engine
from penstock.engine_state import read_share, write_all
from penstock.errors import InputError
from penstock.schedule import Curves
from penstock.streams.train import TrainStream

FINDER = 0x14F1D  # the stream of random numbers that the model's own draws come from
SMOOTH = 0.98  # of the moving average of losses
DIVERGED = 4.0  # times the best loss, where the test ends
FEWEST = 10  # losses that a suggestion needs
TAIL = 5  # last losses that suggestions leave out


@dataclass(frozen=True)
class RangeTest:
    """Learning rates and the losses found with them, in order; the suggestions are None where the loss never falls."""

    rates: list[float]
    losses: list[float]  # as they were
    smooth: list[float]  # their moving average, without its bias towards 0
    diverged: bool  # before the highest rate

    @property
    def valley(self) -> float | None:
        """Half-way down the longest descent, as fastai chooses: the safe one."""
        rates, losses = self._core()
        end, length = longest_descent(losses)
        third = length / 3
        return rates[max(end - length + int(third) + int(third / 2), 0)] if length > 1 else None

    @property
    def steep(self) -> float | None:
        """Where the loss falls fastest per factor of the rate."""
        rates, losses = self._core()
        slopes = [
            (after - before) / math.log(high / low)
            for before, after, low, high in zip(losses, losses[1:], rates, rates[1:], strict=False)
        ]
        best = min(range(len(slopes)), key=slopes.__getitem__, default=None)
        return rates[best] if best is not None and slopes[best] < 0 else None

    def _core(self) -> tuple[list[float], list[float]]:
        """Without the beginning, where the average is young, and the end, where it diverges."""
        skipped = len(self.rates) // 10
        kept = slice(skipped, len(self.rates) - TAIL)
        return self.rates[kept], self.smooth[kept]

    def __str__(self) -> str:
        if self.valley is None or self.steep is None:
            return f"no learning rate from {self.rates[0]:.1e} to {self.rates[-1]:.1e} makes the loss fall"
        end = f"diverges at {self.rates[-1]:.1e}" if self.diverged else f"stable up to {self.rates[-1]:.1e}"
        return f"suggested peak rate: {self.valley:.1e} (longest descent), {self.steep:.1e} (steepest); {end}"


def find_lr(
    engine: Engine,
    stream: TrainStream,
    curves: Curves,
    *,
    seed: int,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
) -> RangeTest:
    """Losses of up to `steps` optimizer steps from the stream's beginning, whose rate grows from `low` to `high`.

    Other knobs have the values of the run's first step. Collective; afterwards everything is as it was. What a method
    does after a step (its teacher, its queue) is left out.

    Raises:
        InputError: fewer than 10 losses were found before it diverged.
    """
    rates: list[float] = []
    losses: list[float] = []
    smooth: list[float] = []
    average, best, diverged, position = 0.0, math.inf, False, 0
    with untouched(engine):
        batches = stream.batches(0, 0)
        for step in range(steps):
            rate = low * (high / low) ** (step / max(steps - 1, 1))
            size = stream.batch_at(position)
            loss = _step(engine, batches, curves.at(0.0, size) | {"lr": rate}, keyed.key(seed, FINDER, step))
            position += size
            if not math.isfinite(loss):
                diverged = True
                break
            average = SMOOTH * average + (1 - SMOOTH) * loss
            rates.append(rate)
            losses.append(loss)
            smooth.append(average / (1 - SMOOTH ** (step + 1)))
            best = min(best, smooth[-1])
            if smooth[-1] > DIVERGED * best:
                diverged = True
                break
    if len(rates) < FEWEST:
        raise InputError(
            f"only {len(rates)} steps, up to a learning rate of {rates[-1] if rates else low:.1e}, gave a finite loss "
            "that did not explode; look at the data and the loss, or start lower"
        )
    return RangeTest(rates, losses, smooth, diverged)


def _step(engine: Engine, batches: Iterator[Any], knobs: dict[str, float], seed: int) -> float:
    """One optimizer step; the mean loss over the valid samples of all ranks, NaN where the step was skipped."""
    engine.set(knobs, 0.0)
    engine.task.before_step(0.0, knobs)
    parts = [next(batches) for _ in range(engine.accumulation)]
    engine.begin(torch.stack([part.weights.sum() for part in parts]).sum())
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for sweep in engine.sweeps(0):
        torch.manual_seed(keyed.key(seed, distributed.rank()))
        for part in parts:
            output = engine.forward(part.to(engine.device), knobs)
            engine.backward(output)
            if sweep == 0:
                weight = output.weight.detach().double()
                sums += torch.stack([output.loss.detach().double() * weight, weight])
    loss, weight = distributed.all_sum(sums).tolist()
    return loss / max(weight, 1.0) if engine.step().applied else math.nan


@contextmanager
def untouched(engine: Engine) -> Iterator[None]:
    """Whatever is trained inside, weights, buffers, optimizer, loss scale and random numbers come back as they were.

    Every rank keeps a whole copy on the CPU meanwhile. Collective.
    """
    saved = read_share(engine.task, engine.masters(), rank=0, world=1)
    buffers = [(buffer, buffer.clone()) for buffer in engine.task.buffers()]
    scaler, training = engine.scaler(), engine.task.training
    devices = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
    masters = engine.masters()
    masters.forget()
    write_all(engine.task, masters, saved.__getitem__, saved)
    for buffer, before in buffers:
        buffer.copy_(before)
    engine.restore_scaler(scaler)
    engine.task.train(training)


def draw(test: RangeTest) -> Tensor:
    """The losses over the rates, and the suggestions: uint8 [3, H, W]."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(test.rates, test.losses, color="0.8", linewidth=1, label="loss")
    axes.plot(test.rates, test.smooth, color="tab:blue", linewidth=2, label="moving average")
    for name, rate, color in (("valley", test.valley, "tab:green"), ("steep", test.steep, "tab:orange")):
        if rate is not None:
            height = test.smooth[test.rates.index(rate)]
            axes.plot([rate], [height], "o", color=color, markersize=9, label=f"{name}: {rate:.1e}")
    low, high = min(test.smooth + test.losses), max(test.smooth[: len(test.smooth) // 10 + 1])
    axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))  # not the explosion at the end
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", title="Learning-rate range test")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).permute(2, 0, 1).contiguous()


def report(test: RangeTest, folder: Path, tracker: Any) -> None:
    """The curve as lr_finder.png in the run's folder and among the run's pictures, and a line on the terminal."""
    if not distributed.is_main():
        return
    from PIL import Image

    picture = draw(test)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / "lr_finder.png")
    tracker.picture(0, "lr_finder", picture)
    tracker.event("lr found", 0, valley=test.valley, steep=test.steep, rates=test.rates, losses=test.losses)
    print(f"{test}. The curve: {folder / 'lr_finder.png'}", flush=True)


def longest_descent(losses: list[float]) -> tuple[int, int]:
    """Where the longest falling sequence ends, and how many losses it has; it may leave out some between."""
    lengths: list[int] = []
    for i, loss in enumerate(losses):
        lengths.append(1 + max((lengths[j] for j in range(i) if losses[j] > loss), default=0))
    end = max(range(len(lengths)), key=lengths.__getitem__, default=0)
    return end, lengths[end] if lengths else 0
