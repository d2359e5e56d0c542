"""Distillation by soft targets (Hinton, Vinyals and Dean 2015)."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from penstock.recipe import Block
from penstock.schedule import Knob, bounds


def above_zero(knob: Any) -> Any:
    """A temperature that stays above 0 on its curve; a validator."""
    least = min(bounds(knob))
    if least <= 0:
        raise ValueError(f"a temperature must be above 0, and this one reaches {least:g}; set the end of its curve")
    return knob


class SoftTargets:
    """T^2 KL(teacher || student) of the softmax at temperature T, summed over the classes.

    T^2 keeps the gradient's size about the same at every temperature.
    """

    class Config(Block):
        name: Literal["soft_targets"] = "soft_targets"
        temperature: Knob = Field(1.0, description="divides both logits; above 1 the unlikely classes say more")

        _positive = field_validator("temperature")(above_zero)

    def __init__(self, config: Config):
        self.config = config

    def __call__(self, student: Tensor, teacher: Tensor, knobs: Mapping[str, float]) -> Tensor:
        """The loss of each sample [B], in at least fp32; no gradient reaches the teacher."""
        temperature = knobs["temperature"]
        with torch.autocast(student.device.type, enabled=False):
            wide = torch.promote_types(student.dtype, torch.float32)
            guess = (student.to(wide) / temperature).log_softmax(1)
            truth = (teacher.detach().to(wide) / temperature).log_softmax(1)
            return temperature**2 * F.kl_div(guess, truth, reduction="none", log_target=True).sum(1)
