"""kNN, probes and health of frozen features, measured while a run goes on."""

from collections.abc import Callable, Mapping
from typing import Any

from penstock.backbones import Backbone
from penstock.engine import Engine
from penstock.evaluate import Measured, measure
from penstock.health import alarms
from penstock.meters import Meters
from penstock.schedule import Tick
from penstock.streams.evaluation import EvalStream


class FrozenFeatures:
    """The recipe's evaluations of the backbone's features (a `Measure`).

    Args:
        evaluations: configs by the component's name; each may say `every`.
        backbone: gives the backbone to measure.
    """

    def __init__(
        self,
        evaluations: Mapping[str, Any],
        backbone: Callable[[], Backbone],
        engine: Engine,
        train: EvalStream,
        val: EvalStream,
        meters: Meters,
    ):
        self.evaluations, self.backbone, self.engine = evaluations, backbone, engine
        self.train, self.val, self.meters = train, val, meters
        self._at: dict[str, int] = {}  # the step at which each was measured last
        self._measured: Measured | None = None

    def __call__(self, tick: Tick) -> dict[str, float]:
        due = {
            name: block
            for name, block in self.evaluations.items()
            if tick.due(block.every) and self._at.get(name) != tick.step
        }
        if not due:
            return {}
        self._at |= dict.fromkeys(due, tick.step)
        with self.engine.autocast():
            self._measured = measure(self.backbone(), due, self.train, self.val, self.engine.device)
        values = {f"eval/{name}": value for name, value in self._measured.metrics.items()}
        return values | {f"health/{name}": value for name, value in self._measured.health.items()}

    def alarms(self) -> list[str]:
        assert self._measured is not None
        task = self.engine.task
        return alarms(self._measured.health, self._measured.dim, self.meters.loss, task.collapse_loss)
