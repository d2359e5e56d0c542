"""What is measured while a run goes on: kNN and probes on frozen features, feature health with alarms, pictures."""

import sys
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from penstock import distributed
from penstock.augment.resize_crop import ResizeCrop
from penstock.engine import Engine
from penstock.errors import InputError
from penstock.evaluate import Measured, measure
from penstock.health import alarms
from penstock.meters import Meters
from penstock.recipe import Block
from penstock.schedule import Clock, Duration, Length
from penstock.streams.data import Data
from penstock.streams.evaluation import EvalStream
from penstock.streams.images import Images
from penstock.tracking import Tracker


class Monitor:
    """Runs the recipe's evaluations when they are due, and at the end.

    Args:
        evaluations: configs by the component's name; each may say `every`.
    """

    class Config(Block):
        at_start: bool = Field(True, description="measure the untrained backbone, too: the baseline")
        limit: int | None = Field(None, ge=1, description="at most this many images of each set; null is all")
        batch: int = Field(128, ge=1, description="images per forward and rank")
        crop_pct: float = Field(
            1.0, gt=0, le=1, description="share of the short side that is seen; 0.875 is usual at 224"
        )
        pictures: Duration | None = Field(Length(25, "%"), description="how often pictures are made; null is never")

    def __init__(
        self,
        config: "Monitor.Config",
        evaluations: Mapping[str, Any],
        data: Data,
        engine: Engine,
        tracker: Tracker,
        clock: Clock,
        meters: Meters,
    ):
        self.config, self.engine, self.tracker, self.clock, self.meters = config, engine, tracker, clock, meters
        self.evaluations = {name: block for name, block in evaluations.items() if block is not None}
        self.train = self._stream(data, data.train)
        self.val = self._stream(data, data.val) if data.val is not None else None
        self.latest: dict[str, float] = {}

    def observe(self, step: int) -> None:
        """Whatever is due after `step` optimizer steps. Collective."""
        last, start = step == self.clock.total, step == 0
        due = {
            name: block
            for name, block in self.evaluations.items()
            if last
            or (start and self.config.at_start)
            or (not start and block.every and self.clock.every(block.every, step))
        }
        if due:
            self._evaluate(step, due)
        pictures = self.config.pictures
        if pictures is not None and not start and (last or self.clock.every(pictures, step)):
            self._pictures(step)

    def _evaluate(self, step: int, due: Mapping[str, Any]) -> None:
        assert self.val is not None  # a rule of the recipe
        with self.engine.autocast():
            measured: Measured = measure(self.engine.task.backbone, due, self.train, self.val, self.engine.device)
        values = {f"eval/{name}": value for name, value in measured.metrics.items()}
        values |= {f"health/{name}": value for name, value in measured.health.items()}
        self.tracker.log(step, values)
        self.latest |= values
        if step == 0:
            self.tracker.log(0, {f"untrained/{name}": value for name, value in measured.metrics.items()})
            return
        for alarm in alarms(measured.health, measured.dim, self.meters.loss, self.engine.task.collapse_loss):
            self.tracker.event("alarm", step, text=alarm)
            if distributed.is_main():
                print(f"alarm at step {step}: {alarm}", file=sys.stderr, flush=True)

    def _pictures(self, step: int) -> None:
        batch = next(iter(self.train if self.val is None else self.val)).to(self.engine.device)
        with self.engine.autocast():
            pictures = self.engine.task.pictures(batch)
        for name, picture in pictures.items():
            self.tracker.picture(step, name, picture)

    def _stream(self, data: Data, manifest: Any) -> EvalStream:
        backbone = self.engine.task.backbone
        height, width = backbone.size
        if height != width:
            raise InputError(f"images are squares here, but backbone.size is {height} x {width}; give one number")
        augment = ResizeCrop(ResizeCrop.Config(size=float(height), crop_pct=self.config.crop_pct))
        return EvalStream(
            Images(manifest, data.config.channels, data.config.cache),
            augment,
            batch=self.config.batch,
            rank=distributed.rank(),
            world=distributed.world(),
            workers=min(data.config.workers, 2),
            limit=self.config.limit,
            device_type=self.engine.device.type,
        )
