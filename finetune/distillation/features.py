"""Feature matching through a learned projector (Romero et al. 2015, FitNets, and what followed)."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from finetune.distillation import Answer, Widths
from finetune.distillation._knobs import not_negative
from finetune.distillation._maps import check_stages, same_size
from penstock.recipe import Block
from penstock.schedule import Knob


class Features(nn.Module):
    """The student's features, projected to the teacher's width, match the teacher's, normalised over the channels.

    Of pooled features, or of every place of the last stages' maps, of which the larger is averaged to the size of the
    smaller. The loss is a mean over channels, places and stages. Projectors train with the student, and are no part of
    what is exported.
    """

    looks_across_samples, raw_logits = False, False

    class Config(Block):
        name: Literal["features"] = "features"
        weight: Knob = Field(1.0, description="of this loss in the sum; no paper's: ours is a mean of normalised ones")
        on: Literal["pooled", "stages"] = Field("pooled", description="pooled features, or maps of the last stages")
        last: int = Field(1, ge=1, description="with on: stages, how many of the last ones (of a ViT, blocks)")
        loss: Literal["mse", "cosine", "smooth_l1"] = Field("mse", description="how features are compared")
        projector: Literal["linear", "mlp"] = Field("linear", description="mlp has one hidden layer")

        _weight = field_validator("weight")(not_negative)

    def __init__(self, config: Config, student: Widths, teacher: Widths):
        super().__init__()
        self.config = config
        self.features, self.stages = config.on == "pooled", config.last if config.on == "stages" else 0
        pairs = [(student.pooled, teacher.pooled)]
        if config.on == "stages":
            check_stages("features", config.last, student, teacher)
            pairs = list(zip(student.stages[-config.last :], teacher.stages[-config.last :], strict=True))
        self.projectors = nn.ModuleList(_projector(config.projector, own, its) for own, its in pairs)

    def forward(
        self, student: Answer, teacher: Answer, targets: Tensor, weights: Tensor, knobs: Mapping[str, float]
    ) -> Tensor:
        pairs = [_places(own, its) for own, its in self._compared(student, teacher)]
        losses = [
            self._difference(_projected(project, own), F.layer_norm(its, its.shape[2:])).mean(1)
            for project, (own, its) in zip(self.projectors, pairs, strict=True)
        ]
        return torch.stack(losses).mean(0)

    def _compared(self, student: Answer, teacher: Answer) -> list[tuple[Tensor, Tensor]]:
        """Pairs of features as maps [B, C, h, w]."""
        if self.config.on == "stages":
            last = self.config.last
            return list(zip(student.stages[-last:], teacher.stages[-last:], strict=True))
        assert student.pooled is not None and teacher.pooled is not None, "asked for by `features`"
        return [(student.pooled[..., None, None], teacher.pooled[..., None, None])]

    def _difference(self, own: Tensor, its: Tensor) -> Tensor:
        """Of features [B, L, D], at each place [B, L]."""
        if self.config.loss == "cosine":
            return 1 - F.cosine_similarity(own, its, dim=2)
        compare = F.mse_loss if self.config.loss == "mse" else F.smooth_l1_loss
        return compare(own, its, reduction="none").mean(2)


def _places(own: Tensor, its: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [B, C, h, w] of one size as features of each place [B, L, C]."""
    a, b = (maps.flatten(2).transpose(1, 2) for maps in same_size(own, its))
    return a, b


def _projected(projector: nn.Module, values: Tensor) -> Tensor:
    """In the weights' own precision, which the engine may have lowered, and back in that of the values."""
    return projector(values.to(next(projector.parameters()).dtype)).to(values.dtype)


def _projector(kind: str, student: int, teacher: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(student, teacher)
    return nn.Sequential(nn.Linear(student, teacher), nn.GELU(), nn.Linear(teacher, teacher))
