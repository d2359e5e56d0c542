"""Accuracy and calibration of a classifier on the validation set, exact over ranks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from finetune.tasks.classify import Classify
from penstock.assembly import Parts
from penstock.backbones import Features
from penstock.backbones.batchnorm import average_statistics, layers_of, set_valid
from penstock.backbones.batchnorm_health import batchnorm_health
from penstock.backbones.recalibrate import recalibrate
from penstock.calibration import calibrate
from penstock.classification import classification_metrics, judge, per_class_accuracy
from penstock.evaluate._features import FeatureSet, extract
from penstock.recipe import Block
from penstock.reliability import reliability, reliability_diagram
from penstock.schedule import Duration, Tick
from penstock.streams.batch import Batch


class Accuracy:
    """Measures `eval/top1`, `eval/ece` and what `classification_metrics` gives (a `Measure`).

    Args:
        model: gives the task whose weights are measured: averaged ones, where the run averages.
        recalibrate: samples over which batch-norm statistics are computed anew before each measurement.
    """

    class Config(Block):
        every: Duration | None = Field(None, description="how often accuracy is measured in a run; its end always is")

    def __init__(self, config: "Accuracy.Config", parts: Parts, model: Callable[[], Classify], recalibrate: int):
        self.config, self.parts, self.model, self.recalibrate = config, parts, model, recalibrate
        self.answers: FeatureSet | None = None  # logits as features, of the last measurement
        self._at: int | None = None

    def __call__(self, tick: Tick) -> dict[str, float]:
        if self._at == tick.step or not tick.due(self.config.every):
            return {}
        self._at = tick.step
        task, engine = self.model(), self.parts.engine
        found: dict[str, float] = {}
        average_statistics(task)
        set_valid(task, None)
        with engine.autocast():
            if self.recalibrate and layers_of(task) and not tick.first:
                found |= recalibrate(task, self.parts.train, self._forward, self.recalibrate).metrics()
            assert self.parts.val is not None  # a rule of the recipe
            self.answers = extract(_Logits(task), self.parts.val, engine.device)
        health = batchnorm_health(task)
        metrics = classification_metrics(self.answers.features, self.answers.labels)
        return found | {f"eval/{n}": v for n, v in metrics.items()} | (health.metrics() if health else {})

    def alarms(self) -> list[str]:
        return []

    def _forward(self, batch: Batch) -> Tensor:
        return self.model().logits(batch.views[0].to(self.parts.engine.device))

    def report(self, folder: Path, classes: tuple[str, ...], seed: int, step: int) -> dict[str, float]:
        """Write the predictions, the accuracy of each class and a reliability diagram; calibration's figures.

        `predictions.npz` holds positions int64 [n], labels int64 [n] and logits float32 [n, K] of the validation set in
        order. Called on the main rank, after the last measurement.
        """
        assert self.answers is not None
        logits, labels, positions = self.answers.features, self.answers.labels, self.answers.positions
        _write(folder / "predictions.npz", positions=positions, labels=labels, logits=logits)
        scores = zip(classes, per_class_accuracy(logits, labels).tolist(), strict=True)
        lines = [f"{score:.2f}\t{name}" for name, score in sorted(scores, key=lambda pair: pair[1])]
        (folder / "per_class.tsv").write_text("top1\tclass\n" + "\n".join(lines) + "\n", encoding="utf-8")
        self.parts.tracker.artifact(folder / "per_class.tsv")
        judged = judge(logits, labels)
        bins = reliability(judged.confidence, judged.correct)
        self.parts.tracker.picture(step, "reliability", reliability_diagram(bins))
        if len(labels) < 2:
            return {}
        return calibrate(logits, labels, positions, seed).metrics


class _Logits(nn.Module):
    """A classifier in the place of a backbone: its logits are the features."""

    def __init__(self, task: Classify):
        super().__init__()
        self.task = task

    def forward(self, images: Tensor) -> Features:
        logits = self.task.logits(images)
        return Features(logits, logits)


def _write(path: Path, **arrays: Tensor) -> None:
    """A .npz that is whole or absent, and holds no pickle."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, **{name: values.numpy() for name, values in arrays.items()})  # type: ignore[arg-type]
    partial.replace(path)
