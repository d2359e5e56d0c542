"""Distillation losses, one file each: what a student learns from its teacher's answers."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from penstock.registry import Registry

DISTILLATIONS = Registry("finetune.distillation")


class Distillation(Protocol):
    """What a distillation task needs. The config's fields typed `Knob` may follow curves."""

    config: Any

    def __call__(self, student: Tensor, teacher: Tensor, knobs: Mapping[str, float]) -> Tensor:
        """The loss [B] of each sample in at least fp32, of the logits [B, K] of both."""
        ...
