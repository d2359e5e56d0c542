"""Means over the steps since the last report, exact over ranks and micro-batches, and how fast they went."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from penstock import distributed
from penstock.streams.batch import Batch
from penstock.streams.timing import NAMES, per_sample
from penstock.task import StepOutput


class Meters:
    """Sums of this rank, in fp64 on its device, so that a step never waits for the host."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._pending: list[tuple[str, Tensor]] = []
        self._samples, self._waited, self._began = 0, 0.0, time.monotonic()
        self._timing = dict.fromkeys(NAMES, 0.0)
        self.loss: float | None = None  # mean of the last report

    def output(self, output: StepOutput) -> None:
        """Note a micro-batch; it counts once its step was applied."""
        weight = output.weight.detach().double()
        self._pending.append(("weight", weight))
        for name, value in {"loss": output.loss, **output.metrics}.items():
            self._pending.append((name, value.detach().double() * weight))

    def made(self, batch: Batch) -> None:
        """Note what it took to make a micro-batch."""
        for name, value in batch.timing.items():
            self._timing[name] += value

    def step(self, applied: bool, samples: int, waited: float, **values: float) -> None:
        """Close a step. Of one that was skipped only the time counts, and that it was skipped."""
        for name, value in self._pending if applied else ():
            self._add(name, value)
        self._pending.clear()
        counts = {"steps": 1.0, **values} if applied else {"skipped": 1.0}
        for name, number in counts.items():
            self._add(name, torch.tensor(number, dtype=torch.float64, device=distributed.device()))
        self._samples += samples
        self._waited += waited

    def report(self) -> tuple[dict[str, float], dict[str, float]]:
        """Means (`train/...`) and speed (`perf/...`) since the last report, then start anew. Collective."""
        names = sorted({"weight", "steps", "skipped"} | self.sums.keys())
        zero = torch.zeros((), dtype=torch.float64, device=distributed.device())
        own = torch.tensor([self._waited, *self._timing.values()], dtype=torch.float64, device=zero.device)
        total = distributed.all_sum(torch.cat([torch.stack([self.sums.get(name, zero) for name in names]), own]))
        *counted, waited = total[: len(names) + 1].tolist()
        sums = dict(zip(names, counted, strict=True))
        weight, steps, skipped = sums.pop("weight"), sums.pop("steps"), sums.pop("skipped")
        per_step = {"grad_norm"}
        means = {f"train/{n}": v / (steps if n in per_step else weight) for n, v in sums.items() if steps and weight}
        self.loss = means.get("train/loss", self.loss)
        if skipped:
            means["train/skipped"] = skipped / distributed.world()
        seconds = max(time.monotonic() - self._began, 1e-9)
        speed = {
            "perf/images_per_second": self._samples / seconds,
            "perf/data_wait": waited / distributed.world() / seconds,
            "perf/memory_gb": memory_gb(),
        }
        timing = dict(zip(NAMES, total[len(names) + 1 :].tolist(), strict=True))
        speed |= {f"perf/{name}": value for name, value in per_sample(timing, seconds).items()}
        self.sums, self._timing = {}, dict.fromkeys(NAMES, 0.0)
        self._samples, self._waited, self._began = 0, 0.0, time.monotonic()
        return means, speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A stretch of time (an evaluation, a checkpoint) that speed does not count."""
        entered = time.monotonic()
        yield
        self._began += time.monotonic() - entered

    def state(self) -> dict[str, Tensor]:
        """This rank's open sums, for its part of a checkpoint."""
        return {name: value.cpu() for name, value in self.sums.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.sums = {name: value.to(distributed.device()) for name, value in state.items()}

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value


def memory_gb() -> float:
    """Peak memory: of the GPU where there is one, else of this process, in GB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
