"""What a network costs to keep and to run: parameters, multiply-accumulates, bytes, and time on this machine."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from penstock.backbones.weights import WEIGHTS_FILE
from penstock.evaluate._features import evaluating
from penstock.export import HEAD_FILE, Classifier

BATCHES = (1, 32)  # images per forward that latency is measured with
ROUNDS = 15
TURN = 0.03  # seconds that a turn of one network lasts at least: shorter ones would measure the clock
WARM_UP = (3, 0.1)  # forwards and seconds at least, before the clock runs

Image = tuple[int, int, int]  # channels, height, width


class Latency(NamedTuple):
    """Milliseconds of one forward of a batch: the median over rounds, the quartiles around it, and every round."""

    median: float
    low: float
    high: float
    rounds: tuple[float, ...]

    def over(self, other: "Latency") -> float:
        """How many times as long as the other's it is: the median over rounds, in which both saw the same load."""
        return statistics.median(own / its for own, its in zip(self.rounds, other.rounds, strict=True))


@dataclass(frozen=True)
class Cost:
    """What one network costs."""

    parameters: int
    macs: int  # multiply-accumulates of one image
    image: Image
    bytes: int | None = None  # of the files of weights, in fp32; None where there is no file
    latency: dict[int, Latency] = field(default_factory=dict)  # by batch


def parameters(model: nn.Module) -> int:
    """Numbers that a network has learned; a shared one counts once, statistics of batch norm do not count."""
    return sum(value.numel() for value in model.parameters())


def macs(model: nn.Module, image: Image) -> int:
    """Multiply-accumulates of one image in convolutions, linear layers, matrix products and attention.

    As papers and timm count them; norms, activations and sums are left out. The network runs in eval mode on the meta
    device, where no arithmetic is done and nothing is fused: fused layers of attention would count as nothing.

    Args:
        image: channels, height and width of what the network is given.
    """
    from torch.utils.flop_counter import FlopCounterMode

    state = {name: value.to("meta") for name, value in [*model.named_parameters(), *model.named_buffers()]}
    images = _images(model, 1, image, torch.device("meta"))
    with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(model, state, (images,))
    return counter.get_total_flops() // 2


def file_bytes(export: Path) -> int:
    """Bytes of an export's weights, its head included."""
    return sum((export / name).stat().st_size for name in (WEIGHTS_FILE, HEAD_FILE) if (export / name).is_file())


def latencies(
    models: Mapping[str, tuple[nn.Module, Image]],
    batches: Sequence[int] = BATCHES,
    rounds: int = ROUNDS,
    threads: int | None = None,
    device: torch.device | None = None,
) -> dict[str, dict[int, Latency]]:
    """Time of a forward in fp32 and inference mode, by network and batch.

    The networks take turns, in every round in another order, so that what else the machine does in the meantime falls
    on all of them. They stay where they are moved to, in eval mode.

    Args:
        models: networks by name, each with the image that it is given: uint8 for a `Classifier`, else fp32.
        rounds: turns of each network, at each batch.
        threads: of the processor; torch's own number where None.
        device: where to run; the processor where None.
    """
    device = device or torch.device("cpu")
    clock = _on_gpu if device.type == "cuda" else _on_cpu
    found: dict[str, dict[int, Latency]] = {name: {} for name in models}
    names = list(models)
    with _threads(threads), torch.inference_mode():
        for batch in batches:
            turns: dict[str, tuple[Callable[[], object], int]] = {}
            seconds: dict[str, list[float]] = {name: [] for name in names}
            for name, (model, image) in models.items():
                forward = _forward(model.eval().to(device), _images(model, batch, image, device))
                turns[name] = (forward, max(1, math.ceil(TURN / _warm_up(forward, clock))))
            for number in range(rounds):
                first = number % len(names)
                for name in (*names[first:], *names[:first]):
                    seconds[name].append(clock(*turns[name]))
            for name, values in seconds.items():
                found[name][batch] = _quartiles([1000 * value for value in values])
    return found


def _forward(model: nn.Module, images: Tensor) -> Callable[[], object]:
    return lambda: model(images)


def _warm_up(forward: Callable[[], object], clock: Callable[[Callable[[], object], int], float]) -> float:
    """Seconds of the fastest forward of the warm-up, from which follows how many make a turn."""
    least, until = WARM_UP[0], time.perf_counter() + WARM_UP[1]
    took = clock(forward, least)
    while time.perf_counter() < until:
        took = min(took, clock(forward, 1))
    return took


def _on_cpu(forward: Callable[[], object], count: int) -> float:
    """Median seconds of `count` forwards: another process that takes the processor in between falls on few of them."""
    times = [time.perf_counter()]
    for _ in range(count):
        forward()
        times.append(time.perf_counter())
    return statistics.median(end - start for start, end in pairwise(times))


def _on_gpu(forward: Callable[[], object], count: int) -> float:
    """Mean seconds of `count` forwards, which queue behind each other."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        forward()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / count


def _images(model: nn.Module, batch: int, image: Image, device: torch.device) -> Tensor:
    """Noise in the form that the network takes; what is in an image changes no cost."""
    if isinstance(model, Classifier):
        return torch.randint(0, 256, (batch, *image), dtype=torch.uint8, device=device)
    return torch.randn(batch, *image, device=device)


def _quartiles(values: Sequence[float]) -> Latency:
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return Latency(median.item(), low.item(), high.item(), tuple(values))


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
