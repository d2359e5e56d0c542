"""Distillation of classes that are each a yes or no of their own, as in multi-label classification."""

from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from finetune.distillation import Answer, Widths
from finetune.distillation._knobs import above_zero, not_negative
from penstock.recipe import Block
from penstock.schedule import Knob


class BinaryTargets(nn.Module):
    """T^2 KL(teacher || student) of the sigmoid of each class at temperature T, summed over the classes.

    For a teacher trained with the binary loss, whose softmax says little.
    """

    features, stages, looks_across_samples, raw_logits = False, 0, False, True

    class Config(Block):
        name: Literal["binary_targets"] = "binary_targets"
        weight: Knob = Field(1.0, description="of this loss in the sum; beside a loss averaged over K classes, 1/K")
        temperature: Knob = Field(1.0, description="divides both logits")

        _positive = field_validator("temperature")(above_zero)
        _weight = field_validator("weight")(not_negative)

    def __init__(self, config: Config, student: Widths, teacher: Widths):
        super().__init__()
        self.config = config

    def forward(
        self, student: Answer, teacher: Answer, targets: Tensor, weights: Tensor, knobs: Mapping[str, float]
    ) -> Tensor:
        temperature = knobs["temperature"]
        guess, truth = student.logits / temperature, teacher.logits / temperature
        yes = truth.sigmoid() * (F.logsigmoid(truth) - F.logsigmoid(guess))
        no = (-truth).sigmoid() * (F.logsigmoid(-truth) - F.logsigmoid(-guess))
        return temperature**2 * (yes + no).sum(1)
