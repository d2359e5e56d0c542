"""What a finetuning recipe may say."""

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from finetune.accuracy import Accuracy
from finetune.folding import folding_has_batchnorm
from finetune.tasks import TASKS
from penstock.backbones.backbone import Backbone
from penstock.backbones.batchnorm import BatchNorms
from penstock.backbones.dropout import ARGUMENTS, Drop, drop_rules, largest
from penstock.head import Head
from penstock.mixing import Mixing
from penstock.recipe import one_of
from penstock.rules import channels_agree, patches_divide
from penstock.stage import Recipe

ACCURACY_METRICS = frozenset(f"eval/{name}" for name in ("top1", "top5", "nll", "ece", "brier"))


def there_is_a_validation_set(recipe: Any) -> Iterator[str]:
    if recipe.data.val is None:
        yield "data.val: a classifier is measured on a validation set; give the folder of a packed one"


def loss_fits_task(recipe: Any) -> list[str]:
    return TASKS.get(recipe.task.name).conflicts(recipe)


def accumulation_keeps_the_statistics(recipe: Any) -> Iterator[str]:
    if recipe.head.norm == "batch" and recipe.engine.accumulation > 1:
        yield (
            f"head.norm: batch statistics would be those of a micro-batch, {recipe.engine.accumulation} times smaller "
            "than the batch; set engine.accumulation=1 or head.norm=layer"
        )


def repeats_shrink_the_epoch(recipe: Any) -> Iterator[str]:
    if recipe.data.repeats > recipe.batch:
        yield f"data.repeats: {recipe.data.repeats} repeats of a sample do not fit in a batch of {recipe.batch}"


def accuracy_is_measured_to_stop_early(recipe: Any) -> Iterator[str]:
    early = recipe.monitor.stop_early
    if early and early.metric in ACCURACY_METRICS and recipe.measure.every is None:
        yield f"measure.every: stopping early goes by {early.metric}, measured at the end alone; give '1 epochs', say"


def frozen_statistics_stay(recipe: Any) -> Iterator[str]:
    frozen = recipe.transfer.name in ("head", "lora") and recipe.head.norm != "batch"
    if frozen and recipe.batchnorm.recalibrate:
        yield (
            f"batchnorm.recalibrate: with transfer={recipe.transfer.name} the backbone's statistics are frozen, too; "
            "leave it out"
        )


def frozen_backbone_takes_no_options(recipe: Any) -> Iterator[str]:
    """With transfer=head the backbone neither trains nor drops anything, so what is said of it would do nothing."""
    if recipe.transfer.name != "head":
        return
    idle = {"optim.l2_sp": (recipe.optim.pulls, 0), "optim.layer_decay": (recipe.optim.layer_decay < 1, 1)}
    idle |= {f"drop.{kind}": (largest(getattr(recipe.drop, kind)) > 0, 0) for kind in ARGUMENTS}
    for key, (on, off) in idle.items():
        if on:
            yield (
                f"{key}: with transfer=head the backbone is frozen and in eval mode, so this would do nothing; "
                f"set {key}={off}, or train the backbone (transfer=full)"
            )


class Finetune(Recipe):
    """A classifier made of a backbone."""

    backbone: Backbone.Config
    task: one_of("finetune.tasks", "classify")  # type: ignore[valid-type]
    head: Head.Config = Head.Config()
    loss: one_of("finetune.losses", "cross_entropy")  # type: ignore[valid-type]
    mix: Mixing.Config = Mixing.Config()
    drop: Drop.Config = Drop.Config()
    transfer: one_of("finetune.transfer", "full")  # type: ignore[valid-type]
    batchnorm: BatchNorms.Config = BatchNorms.Config()
    measure: Accuracy.Config = Accuracy.Config()
    fold: bool = Field(False, description="also export the network with batch norm folded into its convolutions")

    rules = (
        *Recipe.rules,
        channels_agree,
        patches_divide,
        there_is_a_validation_set,
        loss_fits_task,
        accumulation_keeps_the_statistics,
        repeats_shrink_the_epoch,
        drop_rules,
        folding_has_batchnorm,
        accuracy_is_measured_to_stop_early,
        frozen_statistics_stay,
        frozen_backbone_takes_no_options,
    )
    own_metrics = ACCURACY_METRICS

    def absent(self) -> Iterator[str]:
        yield from super().absent()
        yield from TASKS.get(self.task.name).absent(self)
