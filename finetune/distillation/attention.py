"""Attention transfer (Zagoruyko and Komodakis 2017)."""

from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from finetune.distillation import Answer, Widths
from finetune.distillation._knobs import not_negative
from finetune.distillation._maps import check_stages, same_size
from penstock.recipe import Block
from penstock.schedule import Knob


class Attention(nn.Module):
    """Student and teacher look at the same places: the squares of their maps, averaged over the channels.

    Each map of attention has norm 1; their squared difference is averaged over the places, as in the authors' code, and
    added up over the stages. Networks of different widths can be compared as they are.
    """

    features, looks_across_samples, raw_logits = False, False, False

    class Config(Block):
        name: Literal["attention"] = "attention"
        weight: Knob = Field(1000.0, description="of this loss in the sum; the paper's, whose loss is a small one")
        last: int = Field(3, ge=1, description="how many of the last stages (of a ViT, blocks) are compared")

        _weight = field_validator("weight")(not_negative)

    def __init__(self, config: Config, student: Widths, teacher: Widths):
        super().__init__()
        check_stages("attention", config.last, student, teacher)
        self.config, self.stages = config, config.last

    def forward(
        self, student: Answer, teacher: Answer, targets: Tensor, weights: Tensor, knobs: Mapping[str, float]
    ) -> Tensor:
        last = self.config.last
        pairs = zip(student.stages[-last:], teacher.stages[-last:], strict=True)
        losses = [_difference(own, its) for own, its in pairs]
        return sum(losses[1:], losses[0])


def _difference(own: Tensor, its: Tensor) -> Tensor:
    """Of two stages' maps [B, C, h, w], the mean squared difference of where they look [B]."""
    looks = same_size(*(maps.square().mean(1, keepdim=True) for maps in (own, its)))
    a, b = (F.normalize(look.flatten(1)) for look in looks)
    return (a - b).square().mean(1)
