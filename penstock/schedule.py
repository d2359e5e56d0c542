"""Durations, and curves over a run: pure functions of the step, so a resumed run continues on the same curve."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

UNITS = {"step": "steps", "epoch": "epochs", "sample": "samples", "%": "%"}


@dataclass(frozen=True)
class Clock:
    """What turns durations into steps: the run's length, its batch, and the size of an epoch.

    Time is counted in steps of `batch` samples. Where the batch grows during a run (penstock/streams/train.py), an
    optimizer step lasts longer than 1, and the run takes fewer of them; the samples seen stay the same.
    """

    total: int  # steps of `batch` samples in the run
    batch: int  # samples per optimizer step, over all ranks
    epoch: int  # samples in an epoch

    @classmethod
    def of(cls, duration: "Length", batch: int, epoch: int) -> "Clock":
        if duration.unit == "%":
            raise ValueError("the run's own length cannot be a fraction of itself; give steps, epochs or samples")
        return cls(max(1, math.ceil(Clock(1, batch, epoch).steps(duration) - 1e-9)), batch, epoch)

    def steps(self, duration: "Length") -> float:
        per_unit = {"steps": 1.0, "epochs": self.epoch / self.batch, "samples": 1 / self.batch, "%": self.total / 100}
        return duration.amount * per_unit[duration.unit]

    @property
    def samples(self) -> int:
        """Samples in the run."""
        return self.total * self.batch

    def tick(self, step: int, seen: int, before: int | None = None, ended: bool = False) -> "Tick":
        """The moment after optimizer step `step`, which took the samples seen from `before` to `seen`."""
        return Tick(step, (seen if before is None else before) / self.batch, seen / self.batch, self, ended)


@dataclass(frozen=True)
class Tick:
    """The moment after an optimizer step, or before the first."""

    step: int  # optimizer steps taken
    before: float  # the clock's time before the step
    now: float  # and after it
    clock: Clock
    ended: bool = False  # the run was ended here, before its time

    @property
    def first(self) -> bool:
        return self.step == 0

    @property
    def last(self) -> bool:
        return self.ended or self.now >= self.clock.total

    def due(self, duration: "Length | None") -> bool:
        """Whether what happens at the start, the end and every `duration` happens now."""
        return self.first or self.last or self.every(duration)

    def every(self, duration: "Length | None") -> bool:
        """Whether an interval of this length has just ended; never for None."""
        length = self.clock.steps(duration) if duration is not None else 0
        return length > 0 and math.floor(self.now / length + 1e-9) > math.floor(self.before / length + 1e-9)


@dataclass(frozen=True)
class Length:
    """A length of training: an amount of steps, epochs, samples, or per cent of the run."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, value: Any) -> "Length":
        hint = f"{value!r} is not a duration; write '500 steps', '10 epochs', '1e6 samples', or a fraction such as 0.05"
        if isinstance(value, Length):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if value == 0:
                return cls(0.0, "steps")
            if 0 < value <= 1 and isinstance(value, float):
                return cls(100.0 * value, "%")
            raise ValueError(hint)
        match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*(%|[a-z]+)\s*", str(value), re.IGNORECASE)
        unit = UNITS.get(match[2].lower().rstrip("s")) if match else None
        if not match or unit is None:
            raise ValueError(hint)
        return cls(float(match[1]), unit)

    def __str__(self) -> str:
        return f"{self.amount:g}%" if self.unit == "%" else f"{self.amount:.12g} {self.unit}"


Duration = Annotated[
    Length,
    BeforeValidator(Length.parse),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "description": "steps, epochs, samples or a fraction of the run"}),
]


class _Curve(BaseModel):
    """`start` is reached at the end of the warm-up, `end` at the end of the run."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    start: float = 1.0
    end: float = 0.0
    warmup: Duration = Length(0.0, "steps")
    warmup_from: float = 0.0

    def shape(self, done: float, clock: Clock) -> float:
        """Value for `done` in [0, 1], the share of the run after the warm-up."""
        raise NotImplementedError

    def at(self, step: float, clock: Clock) -> float:
        """Value for the update that follows `step` applied updates; past the end it stays at the last value."""
        warmup = clock.steps(self.warmup)
        if step < warmup:
            return self.warmup_from + (self.start - self.warmup_from) * step / warmup
        done = (step - warmup) / max(clock.total - warmup, 1e-9)
        return self.shape(min(max(done, 0.0), 1.0), clock)


class Constant(_Curve):
    name: Literal["constant"] = "constant"

    def shape(self, done: float, clock: Clock) -> float:
        return self.start


class Linear(_Curve):
    name: Literal["linear"] = "linear"

    def shape(self, done: float, clock: Clock) -> float:
        return self.start + (self.end - self.start) * done


class Cosine(_Curve):
    """Half a cosine from start to end (Loshchilov and Hutter 2017), without restarts."""

    name: Literal["cosine"] = "cosine"

    def shape(self, done: float, clock: Clock) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * done))


class Polynomial(_Curve):
    name: Literal["poly"] = "poly"
    power: float = 2.0

    def shape(self, done: float, clock: Clock) -> float:
        return self.end + (self.start - self.end) * (1.0 - done) ** self.power


class WarmupStableDecay(_Curve):
    """Constant, then a decay over the last part of the run (Hu et al. 2024, MiniCPM)."""

    name: Literal["wsd"] = "wsd"
    decay: Duration = Length(20.0, "%")
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"

    def shape(self, done: float, clock: Clock) -> float:
        after_warmup = max(clock.total - clock.steps(self.warmup), 1e-9)
        share = min(clock.steps(self.decay) / after_warmup, 1.0)
        down = (done - (1.0 - share)) / share if share > 0 else float(done >= 1.0)
        if down <= 0:
            return self.start
        left = {"linear": 1 - down, "cosine": 0.5 * (1 + math.cos(math.pi * down)), "sqrt": 1 - math.sqrt(down)}
        return self.end + (self.start - self.end) * left[self.decay_shape]


class Step(_Curve):
    """Multiplied by `factor` at each milestone; `end` is not used. With `values`, takes those values instead."""

    name: Literal["step"] = "step"
    milestones: list[Duration] = []
    factor: float = 0.1
    values: list[float] = []

    def at(self, step: float, clock: Clock) -> float:
        warmup = clock.steps(self.warmup)
        if step < warmup:
            return super().at(step, clock)
        passed = sum(step >= clock.steps(milestone) - 1e-9 for milestone in self.milestones)
        if self.values:
            return [self.start, *self.values][min(passed, len(self.values))]
        return self.start * self.factor**passed


class OneCycle(_Curve):
    """Up from `start` to `top`, then down to `end` (Smith 2018), as torch's OneCycleLR: the last step has `end`.

    For a learning rate, as a fraction of its peak, `top` is 1; for a momentum that falls while the rate rises, below
    `start`, such as {start: 0.95, top: 0.85, end: 0.95}.
    """

    name: Literal["one_cycle"] = "one_cycle"
    start: float = 0.04
    top: float = 1.0
    end: float = 4e-6
    peak: Duration = Field(Length(30.0, "%"), description="when the top is reached")
    shape_of: Literal["cos", "linear"] = Field("cos", description="of the way up and of the way down")

    def at(self, step: float, clock: Clock) -> float:
        warmup = clock.steps(self.warmup)
        if step < warmup:
            return super().at(step, clock)
        last = max(clock.total - warmup - 1, 0.0)
        peak = min(max(clock.steps(self.peak) - warmup - 1, 0.0), last)
        done = min(step - warmup, last)
        if 0 < peak >= done:
            return self._between(self.start, self.top, done / peak)
        return self._between(self.top, self.end, (done - peak) / (last - peak) if last > peak else 1.0)

    def _between(self, a: float, b: float, share: float) -> float:
        return a + (b - a) * (share if self.shape_of == "linear" else 0.5 * (1 - math.cos(math.pi * share)))


Curve = Annotated[
    Constant | Linear | Cosine | Polynomial | WarmupStableDecay | Step | OneCycle,
    Field(discriminator="name"),
]
CURVES = {kind.model_fields["name"].default: kind for kind in _Curve.__subclasses__()}

Scale = Callable[[int], float]

# A number that may follow a curve over the run.
Knob = float | Curve


def value_at(knob: Any, step: float, clock: Clock) -> float:
    """A knob's value: a plain number stays what it is."""
    return float(knob) if isinstance(knob, (int, float)) else knob.at(step, clock)


def bounds(knob: Any) -> list[float]:
    """Numbers that bound a knob's values from both sides, and that it takes or tends to."""
    if isinstance(knob, (int, float)):
        return [float(knob)]
    values = [knob.start, *([knob.warmup_from] if knob.warmup.amount > 0 else [])]
    if knob.name == "step":
        return values + (knob.values or [knob.start * knob.factor ** len(knob.milestones)])
    if knob.name == "one_cycle":
        values.append(knob.top)
    return values if knob.name == "constant" else [*values, knob.end]


def knobs_of(config: BaseModel) -> dict[str, Any]:
    """The fields of a component's config that are knobs (a number or a curve), by name."""
    fields = type(config).model_fields
    return {name: getattr(config, name) for name, field in fields.items() if field.annotation == Knob}


class Curves:
    """The values that follow a curve over a run, by name.

    Args:
        knobs: numbers or curves.
        scale: for some of them, what a batch multiplies them by; a schedule of the learning rate is a fraction of its
            peak, which depends on the batch.
    """

    def __init__(self, knobs: Mapping[str, Any], clock: Clock, scale: Mapping[str, Scale] | None = None):
        self.knobs, self.clock, self.scale = dict(knobs), clock, dict(scale or {})

    def at(self, time: float, batch: int) -> dict[str, float]:
        """Values for an update on `batch` samples that begins at `time`, in steps of the clock's batch."""
        return {
            name: value_at(knob, time, self.clock) * (self.scale[name](batch) if name in self.scale else 1.0)
            for name, knob in self.knobs.items()
        }


def trace(knobs: Mapping[str, Any], clock: Clock, points: int = 200) -> dict[str, list[tuple[int, float]]]:
    """Each knob's (step, value) at up to `points` steps from first to last, for plots and tests."""
    steps = sorted({round(i * (clock.total - 1) / max(points - 1, 1)) for i in range(points)})
    return {name: [(step, value_at(knob, step, clock)) for step in steps] for name, knob in knobs.items()}
