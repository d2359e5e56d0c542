"""Distillation by soft targets (Hinton, Vinyals and Dean 2015)."""

from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from finetune.distillation import Answer, Widths
from finetune.distillation._temperature import above_zero, log_probabilities, not_negative
from penstock.recipe import Block
from penstock.schedule import Knob


class SoftTargets(nn.Module):
    """T^2 KL(teacher || student) of the softmax at temperature T, summed over the classes.

    T^2 keeps the gradient's size about the same at every temperature.
    """

    features, stages, looks_across_samples = False, 0, False

    class Config(Block):
        name: Literal["soft_targets"] = "soft_targets"
        weight: Knob = Field(1.0, description="of this loss in the sum")
        temperature: Knob = Field(1.0, description="divides both logits; above 1 the unlikely classes say more")

        _positive = field_validator("temperature")(above_zero)
        _weight = field_validator("weight")(not_negative)

    def __init__(self, config: Config, student: Widths, teacher: Widths):
        super().__init__()
        self.config = config

    def forward(
        self, student: Answer, teacher: Answer, targets: Tensor, weights: Tensor, knobs: Mapping[str, float]
    ) -> Tensor:
        temperature = knobs["temperature"]
        guess, truth = (log_probabilities(answer.logits, temperature) for answer in (student, teacher))
        return temperature**2 * F.kl_div(guess, truth, reduction="none", log_target=True).sum(1)
