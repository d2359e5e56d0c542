"""Distillation from a teacher, online or cached, by any sum of losses (Hinton et al. 2015; Beyer et al. 2022)."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from finetune.answers import MAKE, Cache, Identity, restore
from finetune.answers import conflicts as cached_conflicts
from finetune.distillation import DISTILLATIONS, Answer, Widths
from finetune.distillation._knobs import not_negative
from finetune.tasks import Pieces
from finetune.tasks.classify import Apart, Classify
from finetune.teachers import Teacher, all_stages, exists, known, load_teacher
from penstock import distributed
from penstock.backbones import Backbone
from penstock.backbones.dropout import largest
from penstock.recipe import Block, several_of
from penstock.schedule import Knob, knobs_of
from penstock.streams.batch import Batch
from penstock.streams.data import Data
from penstock.streams.sidecar import Sidecar
from penstock.task import StepOutput, weighted_mean

NARROW = Widths(2, 8, (8,) * 64)  # of networks that exist only to ask what a loss needs
log = logging.getLogger(__name__)


class Distill(Classify):
    """The student learns from the labels and from a frozen teacher, which sees the very same crop and mixing."""

    class Config(Block):
        name: Literal["distill"] = "distill"
        teacher: str = Field(description="a finetuned run, a classifier's export, or timm:MODEL")
        cache: str | None = Field(
            None, description="folder of the teacher's answers, from `python -m finetune.teacher`; it then does not run"
        )
        labels: Knob = Field(1.0, description="weight of the labels' loss in the sum")
        losses: several_of("finetune.distillation") = Field(  # type: ignore[valid-type]
            {"soft_targets": {}}, description="what is learned from the teacher, by name; each has a weight"
        )

        _weight = field_validator("labels")(not_negative)
        _known = field_validator("teacher")(known)

        def blocks(self) -> dict[str, Any]:
            """The losses that are on, by name."""
            found = self.losses if isinstance(self.losses, dict) else dict(self.losses or {})
            given = {name: block for name, block in found.items() if block is not None}
            return {n: DISTILLATIONS.get(n).Config(**b) if isinstance(b, dict) else b for n, b in given.items()}

    @classmethod
    def absent(cls, recipe: Any) -> Iterator[str]:
        if not exists(recipe.task.teacher):
            yield (
                f"task.teacher: there is no {recipe.task.teacher!r} here; give a finetuned run, its export, or a model "
                "of timm's as timm:MODEL"
            )
        if recipe.task.cache is not None and not Path(recipe.task.cache).expanduser().is_dir():
            yield f"task.cache: there is no folder {recipe.task.cache!r} here; {MAKE.format(recipe.task.cache)}"

    @classmethod
    def conflicts(cls, recipe: Any) -> list[str]:
        return list(_conflicts(recipe))

    @classmethod
    def smoothing(cls, recipe: Any) -> float:
        return super().smoothing(recipe) if largest(recipe.task.labels) > 0 else 0.0

    @classmethod
    def knobs(cls, config: Any) -> dict[str, Any]:
        inner = {f"{name}.{k}": v for name, block in config.blocks().items() for k, v in knobs_of(block).items()}
        return {**knobs_of(config), **inner}

    def __init__(self, config: "Distill.Config", pieces: Pieces):
        super().__init__(config, pieces)
        teacher = load_teacher(config.teacher, pieces.classes, pieces.backbone.config.channels, pieces.sizes)
        own, its = widths(pieces.backbone, len(pieces.classes)), teacher.widths(max(pieces.sizes))
        losses = {name: DISTILLATIONS.get(name)(block, own, its) for name, block in config.blocks().items()}
        self.stages = max((loss.stages for loss in losses.values()), default=0)
        self.losses = nn.ModuleDict(losses)
        self.apart = Apart(teacher=teacher)
        _warn_of_size(pieces, teacher)

    def sidecar(self, recipe: Any, data: Data) -> Sidecar | None:
        if self.config.cache is None:
            return None
        expected = Identity.of(recipe, self.apart.teacher, self.pieces.classes, data.train)
        self.apart = Apart(teacher=None)  # it has said who it is, and only takes memory from here on
        cache = Cache.open(self.config.cache, expected)
        cache.check_use(recipe, [name for name, loss in self.losses.items() if loss.raw_logits])
        return cache.sidecar(data.train)

    def forward(self, batch: Batch, knobs: Mapping[str, float]) -> StepOutput:
        images, targets = self.mixed(batch, knobs)
        features = self.backbone(images, self.stages)
        logits, taught = self.head.both(features)
        own, its = Answer(taught, features.pooled, features.stages), self.taught(images, batch)
        losses = knobs["labels"] * self.pieces.loss(logits, targets)
        metrics = {}
        with torch.autocast(images.device.type, enabled=False):
            own, its = _wide(own), _wide(its)
            for name, loss in self.losses.items():
                mine = {
                    key.removeprefix(f"{name}."): value for key, value in knobs.items() if key.startswith(f"{name}.")
                }
                found = loss(own, its, targets, batch.weights, mine)
                losses = losses + mine["weight"] * found
                metrics[f"loss_{name}"] = weighted_mean(found.detach(), batch.weights)
        agree = (taught.detach().argmax(1) == its.logits.argmax(1)).float()
        metrics["agreement"] = 100 * weighted_mean(agree, batch.weights)
        output = self.output(logits, targets, losses, batch)
        return StepOutput(output.loss, output.weight, {**output.metrics, **metrics})

    def taught(self, images: Tensor, batch: Batch) -> Answer:
        """The teacher's answer for images normalised as the student takes them; the cached one, if there is a cache."""
        if self.config.cache is not None:
            return Answer(restore(batch.extra, len(self.pieces.classes)))
        return self.apart.teacher.to(images.device)(images, self.backbone, self.stages)


def _conflicts(recipe: Any) -> Iterator[str]:
    blocks = recipe.task.blocks()
    if not blocks and largest(recipe.task.labels) == 0:
        yield "task.losses: there is nothing to learn from; give a loss, such as task.losses.soft_targets.weight=1"
    kinds = {name: DISTILLATIONS.get(name) for name in blocks}
    if recipe.task.cache is not None:
        for name, kind in kinds.items():
            made = kind(blocks[name], NARROW, NARROW)
            if made.features or made.stages:
                yield (
                    f"task.losses.{name}: it compares features, and a cache holds logits alone; set task.cache=null, "
                    f"so that the teacher runs, or task.losses.{name}=null; a cache teaches soft_targets, decoupled, "
                    "dist and hard_labels"
                )
        yield from cached_conflicts(recipe)
    for name, kind in kinds.items():
        if kind.looks_across_samples and recipe.engine.accumulation > 1:
            yield (
                f"engine.accumulation: {name} compares the samples of a micro-batch, which would be "
                f"{recipe.engine.accumulation} times fewer than the batch; set engine.accumulation=1, or "
                f"task.losses.{name}=null"
            )


def widths(backbone: Backbone, classes: int) -> Widths:
    """The widths of a student's answers."""
    state = {name: value.to("meta") for name, value in [*backbone.named_parameters(), *backbone.named_buffers()]}
    images = torch.empty(1, backbone.config.channels, *backbone.size, device="meta")

    def maps(stages: int) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return torch.func.functional_call(backbone, state, (images, stages)).stages

    was_training = backbone.training
    backbone.eval()  # in train mode batch norm asks other ranks, and has no statistics of a single value
    try:
        return Widths(classes, backbone.dim, all_stages(backbone.model, maps))
    finally:
        backbone.train(was_training)


def _wide(answer: Answer) -> Answer:
    """In at least fp32."""

    def wide(values: Tensor) -> Tensor:
        return values.to(torch.promote_types(values.dtype, torch.float32))

    pooled = None if answer.pooled is None else wide(answer.pooled)
    return Answer(wide(answer.logits), pooled, tuple(map(wide, answer.stages)))


def _warn_of_size(pieces: Pieces, teacher: Teacher) -> None:
    own = sum(param.numel() for part in (pieces.backbone, pieces.head) for param in part.parameters())
    its = sum(param.numel() for param in teacher.parameters())
    if own > its and distributed.is_main():
        log.warning(
            "the student has %.3g M parameters, its teacher %.3g M: distillation is meant for a smaller student; "
            "swap them, or mean it (a network of equal size can learn from itself)",
            own / 1e6, its / 1e6,
        )  # fmt: skip
