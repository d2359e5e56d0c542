"""What is measured while a run goes on, and when: figures with alarms, pictures, and whether it is worth going on."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from pydantic import Field
from torch import Tensor

from penstock import distributed
from penstock.augment.resize_crop import ResizeCrop
from penstock.errors import InputError
from penstock.recipe import Block
from penstock.schedule import Duration, Length, Tick
from penstock.streams.data import Data
from penstock.streams.evaluation import EvalStream
from penstock.streams.images import Images
from penstock.streams.sets.manifest import Manifest
from penstock.streams.stages import After
from penstock.tracking import Tracker

LESS_IS_BETTER = {"loss", "nll", "ece", "brier", "error"}  # words of a metric's name


class Measure(Protocol):
    """Something to measure. It knows itself what is due (`Tick.due`), and measures nothing twice at a step."""

    def __call__(self, tick: Tick) -> dict[str, float]:
        """Metrics by their full names, such as eval/knn_top1. Collective, and the same on all ranks."""
        ...

    def alarms(self) -> list[str]:
        """What is wrong with what was measured last."""
        ...


class StopEarly:
    """Whether a metric has stopped getting better. Rank 0 decides for all."""

    class Config(Block):
        metric: str = Field("eval/top1", description="as it is tracked; more is better, but for losses and errors")
        patience: int = Field(3, ge=1, description="measurements in a row that may bring nothing")
        least: float = Field(0.0, ge=0, description="gain that counts")

    def __init__(self, config: "StopEarly.Config"):
        self.config, self.since = config, 0
        self.best: float | None = None
        self._sign = -1 if LESS_IS_BETTER & set(re.split("[/_]", config.metric)) else 1

    def better(self, value: float) -> bool:
        """Take in a measurement; whether it is the best so far. What is not a number never is."""
        improved = value == value and (self.best is None or self._sign * (value - self.best) > self.config.least)
        self.best, self.since = (value, 0) if improved else (self.best, self.since + 1)
        return improved

    @property
    def enough(self) -> bool:
        return distributed.broadcast(self.since >= self.config.patience)


class Monitor:
    """Measures what is due.

    Args:
        pictures: gives named pictures, uint8 [3, H, W]; collective.
        keep: called when a measurement is the best so far, where the run may stop early.
    """

    class Config(Block):
        at_start: bool = Field(True, description="measure before the first step, too: the baseline")
        limit: int | None = Field(None, ge=1, description="at most this many images of each set; null is all")
        batch: int = Field(128, ge=1, description="images per forward and rank")
        size: int | None = Field(None, ge=1, description="side of the images measured on; null is the backbone's")
        crop_pct: float = Field(
            1.0, gt=0, le=1, description="share of the short side that is seen; 0.875 is usual at 224"
        )
        pictures: Duration | None = Field(Length(25, "%"), description="how often pictures are made; null is never")
        stop_early: StopEarly.Config | None = Field(None, description="end the run when a metric stops getting better")

    def __init__(
        self,
        config: "Monitor.Config",
        measures: Sequence[Measure],
        tracker: Tracker,
        pictures: Callable[[], dict[str, Tensor]],
        keep: Callable[[int], None] | None = None,
    ):
        self.config, self.measures, self.tracker = config, measures, tracker
        self.pictures, self.keep = pictures, keep
        self.stop_early = StopEarly(config.stop_early) if config.stop_early else None
        self.latest: dict[str, float] = {}

    def observe(self, tick: Tick) -> bool:
        """Whatever is due at `tick`, each once. Whether the run has come to nothing more. Collective."""
        values: dict[str, float] = {}
        for measure in self.measures if self.config.at_start or not tick.first else ():
            measured = measure(tick)
            values |= measured
            for alarm in measure.alarms() if measured and not tick.first else ():
                self.tracker.event("alarm", tick.step, text=alarm)
                if distributed.is_main():
                    print(f"alarm at step {tick.step}: {alarm}", file=sys.stderr, flush=True)
        if values:
            self._note(tick, values)
        if self.config.pictures is not None and not tick.first and (tick.last or tick.every(self.config.pictures)):
            for name, picture in self.pictures().items():
                self.tracker.picture(tick.step, name, picture)
        # Asked only after a measurement: ranks have to agree, and each time they wait for one another.
        return bool(values) and self.stop_early is not None and self.stop_early.enough

    def _note(self, tick: Tick, values: dict[str, float]) -> None:
        self.tracker.log(tick.step, values)
        self.latest |= values
        if tick.first:
            untrained = {f"untrained/{name.removeprefix('eval/')}": v for name, v in values.items() if "eval/" in name}
            self.tracker.log(0, untrained)
        if self.stop_early is None:
            return
        metric = self.stop_early.config.metric
        if tick.first and metric not in values:
            raise InputError(f"monitor.stop_early.metric: no {metric} is measured, but {', '.join(sorted(values))}")
        if not tick.first and metric in values and self.stop_early.better(values[metric]) and self.keep:
            self.keep(tick.step)

    def ended(self) -> bool:
        """Whether a run that ended early stays ended: a resume may have more patience. Collective."""
        return self.stop_early is not None and self.stop_early.enough

    def state(self) -> dict[str, Any]:
        """For the checkpoint: JSON-ready."""
        return {"best": self.stop_early.best, "since": self.stop_early.since} if self.stop_early else {}

    def load(self, state: Mapping[str, Any]) -> None:
        if self.stop_early and state:
            self.stop_early.best, self.stop_early.since = state["best"], state["since"]


def eval_stream(
    config: Monitor.Config,
    data: Data,
    manifest: Manifest,
    size: tuple[int, int],
    device_type: str,
    numbers: np.ndarray | None = None,
) -> EvalStream:
    """A set as it is measured: each image once, its short side resized, the centre cut out.

    Stages and other members come as in training; a set that has none of these members gives None.
    """
    height, width = (config.size, config.size) if config.size else size
    if height != width:
        raise InputError(f"images are squares here, but backbone.size is {height} x {width}; give one number")
    augment = ResizeCrop(ResizeCrop.Config(size=float(height), crop_pct=config.crop_pct))
    images = Images(manifest, data.config.channels, data.config.cache)
    return EvalStream(
        images,
        augment,
        batch=config.batch,
        rank=distributed.rank(),
        world=distributed.world(),
        workers=data.config.workers,
        limit=config.limit,
        device_type=device_type,
        numbers=numbers,
        after=After.of(images, augment, data.config.extra, data.config.stages, seed=0),
    )
