"""Distillation from an online teacher (Hinton, Vinyals and Dean 2015; Beyer et al. 2022)."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from finetune.distillation.soft_targets import SoftTargets, above_zero
from finetune.tasks import Pieces
from finetune.tasks.classify import Apart, Classify
from penstock.backbones import Backbone
from penstock.class_names import check_classes
from penstock.errors import InputError
from penstock.recipe import Block
from penstock.schedule import Knob, bounds
from penstock.streams.batch import Batch
from penstock.task import StepOutput

if TYPE_CHECKING:
    from penstock.export import Classifier


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
            for value in bounds(weight):
                if not 0 <= value <= 1:
                    raise ValueError(f"a share lies between 0 and 1, and this one reaches {value:g}")
            return weight

        _positive = field_validator("temperature")(above_zero)

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
        teacher = self.apart.teacher.to(images.device)
        return teacher(_renormalize(images, self.backbone, teacher.backbone))


def _renormalize(images: Tensor, own: Backbone, its: Backbone) -> Tensor:
    """Images of one backbone's mean and std with those of another; the very images where these are the same."""
    if torch.equal(own.mean, its.mean) and torch.equal(own.std, its.std):
        return images
    shift = (own.mean - its.mean) / its.std
    return torch.addcmul(shift[:, None, None], images, (own.std / its.std)[:, None, None])


def _teacher(folder: str, pieces: Pieces) -> "Classifier":
    from penstock.export import load_classifier

    teacher = load_classifier(Path(folder).expanduser())
    check_classes(teacher.classes, pieces.classes, "data.train", "the teacher")
    channels = teacher.backbone.config.channels
    if channels != pieces.backbone.config.channels:
        raise InputError(
            f"task.teacher: it takes images of {channels} channels, the student of {pieces.backbone.config.channels}; "
            "distill from a teacher of the same kind"
        )
    for side in pieces.sizes:
        _try_size(teacher, channels, side)
    return teacher.requires_grad_(False)


def _try_size(teacher: "Classifier", channels: int, side: int) -> None:
    """Run the teacher on the meta device, where no arithmetic is done, on images of a size that it will see."""
    state = {name: value.to("meta") for name, value in [*teacher.named_parameters(), *teacher.named_buffers()]}
    try:
        with torch.no_grad():
            torch.func.functional_call(teacher, state, (torch.empty(1, channels, side, side, device="meta"),))
    except (AssertionError, RuntimeError, ValueError) as error:
        made = " x ".join(map(str, teacher.backbone.size))
        raise InputError(
            f"task.teacher: {teacher.backbone.config.name}, made for {made} pixels, does not take the student's images "
            f"of {side} x {side}: {error}; set augment.size to a size of the teacher's, or take another teacher"
        ) from error
