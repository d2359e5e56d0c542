"""Distillation from an online teacher (Hinton, Vinyals and Dean 2015; Beyer et al. 2022)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from finetune.distillation.soft_targets import SoftTargets
from finetune.tasks import Pieces
from finetune.tasks.classify import Apart, Classify
from penstock.class_names import check_classes
from penstock.errors import InputError
from penstock.recipe import Block
from penstock.schedule import Knob
from penstock.streams.batch import Batch
from penstock.task import StepOutput


class Distill(Classify):
    """The student learns from the labels and from a frozen teacher, which sees the very same crop and mixing."""

    class Config(Block):
        name: Literal["distill"] = "distill"
        teacher: str = Field(description="folder of a classifier's export")
        weight: Knob = Field(0.5, description="of the teacher's loss; the labels' loss has the rest")
        temperature: Knob = Field(1.0, description="divides both logits; above 1 the unlikely classes say more")

        @field_validator("teacher")
        @classmethod
        def _exists(cls, teacher: str) -> str:
            if not Path(teacher).expanduser().is_dir():
                raise ValueError(f"there is no folder {teacher!r}; give the export of a finetuned model")
            return teacher

        @field_validator("weight")
        @classmethod
        def _share(cls, weight: Any) -> Any:
            if isinstance(weight, (int, float)) and not 0 <= weight <= 1:
                raise ValueError("a share lies between 0 and 1")
            return weight

    def __init__(self, config: "Distill.Config", pieces: Pieces):
        super().__init__(config, pieces)
        self.distill = SoftTargets(SoftTargets.Config(temperature=config.temperature))
        self.apart = Apart(teacher=_teacher(config.teacher, pieces))

    def forward(self, batch: Batch, knobs: Mapping[str, float]) -> StepOutput:
        images, targets = self.mixed(batch, knobs)
        logits = self.logits(images)
        taught = self.distill(logits, self.taught(images), knobs)
        losses = (1 - knobs["weight"]) * self.pieces.loss(logits, targets) + knobs["weight"] * taught
        return self.output(logits, targets, losses, batch)

    @torch.no_grad()
    def taught(self, images: Tensor) -> Tensor:
        """The teacher's logits, fp32 [B, K], for images normalised as the student takes them."""
        teacher = self.apart.teacher
        own, its = self.backbone, teacher.backbone
        teacher.to(images.device)
        pixels = images * own.std[:, None, None] + own.mean[:, None, None]
        return teacher((pixels - its.mean[:, None, None]) / its.std[:, None, None])


def _teacher(folder: str, pieces: Pieces) -> nn.Module:
    from penstock.export import load_classifier

    teacher = load_classifier(Path(folder).expanduser())
    check_classes(teacher.classes, pieces.classes, "data.train", "the teacher")
    if teacher.backbone.config.channels != pieces.backbone.config.channels:
        raise InputError(
            f"task.teacher: it takes images of {teacher.backbone.config.channels} channels, the student of "
            f"{pieces.backbone.config.channels}; distill from a teacher of the same kind"
        )
    return teacher.requires_grad_(False)
