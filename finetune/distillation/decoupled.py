"""Decoupled knowledge distillation, DKD (Zhao et al. 2022)."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from finetune.distillation import Answer, Widths
from finetune.distillation._knobs import above_zero, log_probabilities, not_negative
from penstock.errors import InputError
from penstock.recipe import Block
from penstock.schedule import Knob


class Decoupled(nn.Module):
    """T^2 (alpha TCKD + beta NCKD) at temperature T: the two parts of soft targets, weighed on their own.

    TCKD compares how likely the target class is against all others together, NCKD the others among themselves. In soft
    targets the second is weighed by what the teacher leaves to the others, which is little where it is sure.
    """

    features, stages, looks_across_samples, raw_logits = False, 0, False, False

    class Config(Block):
        name: Literal["decoupled"] = "decoupled"
        weight: Knob = Field(
            1.0, description="of this loss in the sum; the paper warms it up: a curve with warmup, end: 1"
        )
        alpha: Knob = Field(1.0, description="of the target class against the others (TCKD)")
        beta: Knob = Field(8.0, description="of the others among themselves (NCKD); 8 on CIFAR-100, 0.5 on ImageNet")
        temperature: Knob = Field(4.0, description="divides both logits; 4 on CIFAR-100, 1 on ImageNet")

        _positive = field_validator("temperature")(above_zero)
        _weights = field_validator("weight", "alpha", "beta")(not_negative)

    def __init__(self, config: Config, student: Widths, teacher: Widths):
        super().__init__()
        self.config = config
        if student.classes < 2:
            raise InputError("task.losses.decoupled compares a class with the others, and there is one class only")

    def forward(
        self, student: Answer, teacher: Answer, targets: Tensor, weights: Tensor, knobs: Mapping[str, float]
    ) -> Tensor:
        target = targets.argmax(1, keepdim=True)
        temperature = knobs["temperature"]
        (guess, guess_others), (truth, truth_others) = (
            _decouple(log_probabilities(answer.logits, temperature), target) for answer in (student, teacher)
        )
        losses = knobs["alpha"] * _kl(guess, truth) + knobs["beta"] * _kl(guess_others, truth_others)
        return temperature**2 * losses


def _decouple(logs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log [p, 1 - p] of the target class [B, 2], and the others' log-probabilities among themselves [B, K].

    In logarithms all along: 1 - p is 0 in fp32 where p is sure. The target's place holds the lowest finite number.
    """
    chosen = torch.zeros_like(logs, dtype=torch.bool).scatter(1, target, True)
    others = logs.masked_fill(chosen, torch.finfo(logs.dtype).min)
    rest = others.logsumexp(1, keepdim=True)
    return torch.cat([logs.gather(1, target), rest], 1), others.log_softmax(1)


def _kl(guess: Tensor, truth: Tensor) -> Tensor:
    return F.kl_div(guess, truth, reduction="none", log_target=True).sum(1)
