"""Distillation by soft targets (Hinton, Vinyals and Dean 2015)."""

from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from finetune.distillation import Answer, Widths
from finetune.distillation._knobs import above_zero, log_probabilities, not_negative
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
        standardize: bool = Field(
            False,
            description="logits of mean 0 and deviation 1 first, so that their order and spacing count (Sun et al. "
            "2024, with temperature 2 and weight 9)",
        )

        _positive = field_validator("temperature")(above_zero)
        _weight = field_validator("weight")(not_negative)

    def __init__(self, config: Config, student: Widths, teacher: Widths):
        super().__init__()
        self.config, self.raw_logits = config, config.standardize

    def forward(
        self, student: Answer, teacher: Answer, targets: Tensor, weights: Tensor, knobs: Mapping[str, float]
    ) -> Tensor:
        temperature = knobs["temperature"]
        logits = student.logits, teacher.logits
        if self.config.standardize:
            logits = F.layer_norm(logits[0], logits[0].shape[1:]), F.layer_norm(logits[1], logits[1].shape[1:])
        guess, truth = (log_probabilities(each, temperature) for each in logits)
        return temperature**2 * F.kl_div(guess, truth, reduction="none", log_target=True).sum(1)
