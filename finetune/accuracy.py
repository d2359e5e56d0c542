"""Accuracy and calibration of a classifier on the validation set, exact over ranks."""

from collections.abc import Callable

from pydantic import Field
from torch import Tensor, nn

from finetune.tasks.classify import Classify
from penstock.assembly import Parts
from penstock.backbones import Features
from penstock.backbones.batchnorm import average_statistics, set_valid
from penstock.backbones.batchnorm_health import BatchNormHealth, batchnorm_health
from penstock.backbones.recalibrate import moving, recalibrate
from penstock.classification import classification_metrics
from penstock.evaluate._features import FeatureSet, extract
from penstock.recipe import Block
from penstock.schedule import Duration, Tick
from penstock.streams.batch import Batch


class Accuracy:
    """Measures `eval/top1`, `eval/ece` and what `classification_metrics` gives (a `Measure`).

    Args:
        model: gives the task whose weights are measured: averaged ones, where the run averages.
        recalibrate: samples over which batch-norm statistics are computed anew before each measurement.

    Attributes:
        answers: logits as features, of the last measurement.
        health: of batch normalisation in the task that trains, then.
    """

    class Config(Block):
        every: Duration | None = Field(None, description="how often accuracy is measured in a run; its end always is")

    def __init__(self, config: "Accuracy.Config", parts: Parts, model: Callable[[], Classify], recalibrate: int):
        self.config, self.parts, self.model, self.recalibrate = config, parts, model, recalibrate
        self.answers: FeatureSet | None = None
        self.health: BatchNormHealth | None = None
        self._at: int | None = None

    def __call__(self, tick: Tick) -> dict[str, float]:
        if self._at == tick.step or not tick.due(self.config.every):
            return {}
        self._at = tick.step
        task, engine = self.model(), self.parts.engine
        # Of the layers that train, before their statistics are averaged over ranks: what there was to put right.
        self.health = batchnorm_health(engine.task)
        found: dict[str, float] = self.health.metrics() if self.health else {}
        average_statistics(task)
        set_valid(task, None)
        with engine.autocast():
            closed = [name for name, opens in task.pieces.transfer.closed.items() if opens > tick.now]
            if self.recalibrate and moving(task, closed) and not tick.first:
                done = recalibrate(task, self.parts.train, self._forward, self.recalibrate, closed)
                found |= done.metrics()
            assert self.parts.val is not None  # a rule of the recipe
            self.answers = extract(_Logits(task), self.parts.val, engine.device)
        metrics = classification_metrics(self.answers.features, self.answers.labels)
        return found | {f"eval/{name}": value for name, value in metrics.items()}

    def alarms(self) -> list[str]:
        return []

    def _forward(self, batch: Batch) -> Tensor:
        return self.model().logits(batch.views[0].to(self.parts.engine.device))


class _Logits(nn.Module):
    """A classifier in the place of a backbone: its logits are the features."""

    def __init__(self, task: Classify):
        super().__init__()
        self.task = task

    def forward(self, images: Tensor) -> Features:
        logits = self.task.logits(images)
        return Features(logits, logits)
