"""Distillation by hard labels (Touvron et al. 2021, DeiT)."""

from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from finetune.distillation import Answer, Widths
from finetune.distillation._knobs import not_negative
from penstock.recipe import Block
from penstock.schedule import Knob


class HardLabels(nn.Module):
    """Cross-entropy with the class that the teacher finds likeliest, as if it were the label.

    A student with a distillation token answers here with that token's head, and to the labels with the other.
    """

    features, stages, looks_across_samples, raw_logits = False, 0, False, False

    class Config(Block):
        name: Literal["hard_labels"] = "hard_labels"
        weight: Knob = Field(1.0, description="of this loss in the sum; equal to that of the labels in DeiT")

        _weight = field_validator("weight")(not_negative)

    def __init__(self, config: Config, student: Widths, teacher: Widths):
        super().__init__()
        self.config = config

    def forward(
        self, student: Answer, teacher: Answer, targets: Tensor, weights: Tensor, knobs: Mapping[str, float]
    ) -> Tensor:
        return F.cross_entropy(student.logits, teacher.logits.argmax(1), reduction="none")
