"""A finetuning run."""

from pathlib import Path
from typing import Any, cast

import torch

from finetune.accuracy import Accuracy
from finetune.folding import check_foldable, fold_export
from finetune.head_init import initialise
from finetune.losses import LOSSES
from finetune.recipe import Finetune
from finetune.report import Report, places, say, stopped
from finetune.tasks import TASKS, Pieces
from finetune.tasks.classify import Classify
from finetune.transfer import TRANSFERS, trained_share
from penstock import distributed
from penstock.assembly import Parts, run
from penstock.backbones import Backbone
from penstock.backbones.batchnorm import BatchNorms, layers_of
from penstock.backbones.dropout import Drop
from penstock.checkpoint import Checkpoints
from penstock.head import Head
from penstock.keyed import key
from penstock.mixing import Mixing
from penstock.monitor import Measure, Monitor, eval_stream
from penstock.schedule import Clock, knobs_of
from penstock.streams.classes import class_names
from penstock.streams.data import Data
from penstock.streams.evaluation import EvalStream
from penstock.streams.sidecar import Sidecar
from penstock.streams.train import side_at

HEAD = 0x4EAD  # the stream of random numbers that a new head starts from
FOLDED = 8  # validation images that the folded form is tried on
ENOUGH = 4096  # samples that batch-norm statistics are computed anew over, where they have to be


def start(recipe: Finetune, find_lr: bool = False) -> int:
    """Finetune, then export the classifier. The exit code."""
    return run(recipe, Finetuning(recipe), find_lr)


class Finetuning:
    """What finetuning adds to a run (a `Stage`)."""

    name = "finetune"

    def __init__(self, recipe: Finetune):
        self.recipe = recipe
        self.mixing = recipe.mix
        self.classes: tuple[str, ...] = ()
        self.accuracy: Accuracy
        self._task: Classify

    def task(self, data: Data, clock: Clock) -> Classify:
        recipe = self.recipe
        classes = self.classes = class_names(data)
        options = {**recipe.backbone.options, **recipe.drop.timm_arguments(recipe.backbone.name)}
        backbone = Backbone(recipe.backbone.model_copy(update={"options": options}))
        if recipe.fold:
            check_foldable(backbone.model, recipe.backbone.name)
        backbone.model = BatchNorms(recipe.batchnorm).apply(backbone.model)
        torch.manual_seed(key(recipe.seed, HEAD))  # the same head whatever the backbone drew
        head = Head(recipe.head, backbone.dim, len(classes), backbone)
        millions = sum(param.numel() for param in backbone.parameters()) / 1e6
        self.mixing, said = recipe.mix.chosen(millions, clock.samples / clock.epoch)
        self.transfer = TRANSFERS.get(recipe.transfer.name)(recipe.transfer)
        pieces = Pieces(
            backbone=backbone,
            head=head,
            loss=LOSSES.get(recipe.loss.name)(recipe.loss),
            mixing=Mixing(self.mixing, recipe.seed),
            drop=Drop(recipe.drop, backbone.model, head.drop),
            transfer=self.transfer,
            classes=classes,
            mixes=self.mixing.mixup != 0 or self.mixing.cutmix != 0,
            sizes=self._sizes(clock, backbone.size_multiple),
        )
        task = self._task = TASKS.get(recipe.task.name)(recipe.task, pieces)
        told = [said]
        if not Checkpoints(recipe.checkpoint, recipe.folder).found():  # else the head comes from the checkpoint
            told.append(initialise(head, backbone, classes, lambda: self._train_images(data, backbone), recipe.seed))
        self.transfer.prepare(task, clock)
        if distributed.is_main():
            print("\n".join([*filter(None, told), trained_share(task)]), flush=True)
        return task

    def _sizes(self, clock: Clock, multiple: int) -> tuple[int, ...]:
        """Sides of the views that the run will show, in pixels."""
        times = [*range(0, clock.total, max(1, clock.total // 10_000)), clock.total - 1]
        return tuple(sorted({side_at(self.recipe.augment.size, time, clock, multiple) for time in times}))

    def sidecar(self, data: Data) -> Sidecar | None:
        return self._task.sidecar(self.recipe, data)

    def opens(self, task: Classify, clock: Clock) -> dict[str, float]:
        return self.transfer.opens(task, clock)

    def knobs(self) -> dict[str, Any]:
        drop = {f"drop_{kind}": knob for kind, knob in knobs_of(self.recipe.drop).items()}
        return {**TASKS.get(self.recipe.task.name).knobs(self.recipe.task), **drop, **self.mixing.knobs()}

    def tags(self) -> dict[str, str]:
        return {"arch": self.recipe.backbone.name, "method": self.recipe.task.name}

    def measures(self, parts: Parts) -> list[Measure]:
        def model() -> Classify:
            return cast(Classify, parts.task)

        self.accuracy = Accuracy(self.recipe.measure, parts, model, self._recalibrate(parts))
        return [self.accuracy]

    def keep(self, parts: Parts, step: int) -> None:
        self._export(parts, step, "best")

    def finish(self, parts: Parts, monitor: Monitor, step: int) -> None:
        answers, folder = self.accuracy.answers, self.recipe.folder
        assert answers is not None and parts.val is not None  # the last step is always measured
        report = Report(folder, answers, self.classes, parts.tracker, step)
        figures = distributed.broadcast(report.calibration(self.recipe.seed) if distributed.is_main() else {})
        monitor.latest |= {f"eval/{name}": value for name, value in figures.items()}
        self._export(parts, step, "export", figures.get("temperature", 1.0))
        if not distributed.is_main():
            return
        report.write_files()
        report.draw_pictures(parts.val)
        rows = report.rows(figures, self.accuracy.health)
        if self.recipe.fold:
            rows.append(("folded", self._fold(folder / "export", parts.val)))
        if monitor.stop_early is not None:
            rows += stopped(monitor.stop_early, folder, step)
        say(f"{self.recipe.name}: step {step:,}", rows + places(folder))

    def _recalibrate(self, parts: Parts) -> int:
        """Samples for batch norm: what the recipe says, or enough where weights are averaged or sizes differ."""
        recipe = self.recipe
        if recipe.batchnorm.recalibrate is not None:
            return recipe.batchnorm.recalibrate
        size = recipe.monitor.size or parts.engine.task.backbone.size[0]
        moves = recipe.average.name != "none" or recipe.augment.size != size  # a curve equals no number
        learns = recipe.batchnorm.mode != "frozen" and recipe.transfer.name not in ("head", "lora")
        return min(ENOUGH, parts.train.samples) if moves and learns and layers_of(parts.engine.task) else 0

    def _train_images(self, data: Data, backbone: Backbone) -> Any:
        """The images whose labels the run may see, as they are measured."""
        device_type = distributed.device().type
        return eval_stream(self.recipe.monitor, data, data.train, backbone.size, device_type, data.part.chosen)

    def _fold(self, export: Path, val: EvalStream) -> str:
        views = [val.view(int(number)) for number in val.numbers[:FOLDED]]
        images = [view for view in views if view is not None]
        if not images:
            return f"no: none of the first {FOLDED} validation images can be read"
        try:
            return fold_export(export, torch.stack(images))
        except RuntimeError as error:  # the run is good all the same
            return f"no: {error}"

    def _export(self, parts: Parts, step: int, name: str, temperature: float = 1.0) -> None:
        from penstock.export import export_classifier

        state = parts.weights()
        if not distributed.is_main():
            return
        recipe = self.recipe
        size = recipe.monitor.size or parts.engine.task.backbone.size[0]
        folder = export_classifier(
            self.transfer.merged(state),
            recipe.backbone,
            recipe.head,
            Path(recipe.folder) / name,
            self.classes,
            about={
                "run": recipe.name,
                "task": recipe.task.name,
                "step": step,
                "smoothing": TASKS.get(recipe.task.name).smoothing(recipe),
            },
            preprocessing={
                "crop_pct": recipe.monitor.crop_pct,
                "test_crop_pct": None,  # timm's own weights may come with another, which would go before
                "crop_mode": "center",
                "interpolation": "bicubic",
                "test_input_size": [recipe.backbone.channels, size, size],
            },
            temperature=temperature,
        )
        parts.tracker.tag(name, str(folder))
        parts.tracker.artifact(folder / "config.json")
