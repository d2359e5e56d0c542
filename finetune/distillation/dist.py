"""Distillation by relations of the answers, DIST (Huang et al. 2022)."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from finetune.distillation import Answer, Widths
from finetune.distillation._knobs import above_zero, not_negative
from finetune.distillation._ranks import total, valid_rows
from penstock.recipe import Block
from penstock.schedule import Knob

FLAT = 1e-8  # variations far smaller than this count as none, as in the authors' code


class Dist(nn.Module):
    """T^2 times 1 - Pearson's correlation of the probabilities at temperature T, of student and teacher.

    `inter`: across the classes of each sample; `intra`: of each class across the samples of all ranks, averaged over
    the classes. A student may be less sure than a much stronger teacher, at no cost.
    """

    features, stages, looks_across_samples, raw_logits = False, 0, True, False

    class Config(Block):
        name: Literal["dist"] = "dist"
        weight: Knob = Field(1.0, description="of this loss in the sum; the paper's, with inter and intra 2")
        inter: Knob = Field(2.0, description="of the relation across classes")
        intra: Knob = Field(2.0, description="of the relation across samples")
        temperature: Knob = Field(1.0, description="divides both logits; 4 on CIFAR-100")

        _positive = field_validator("temperature")(above_zero)
        _weights = field_validator("weight", "inter", "intra")(not_negative)

    def __init__(self, config: Config, student: Widths, teacher: Widths):
        super().__init__()
        self.config = config

    def forward(
        self, student: Answer, teacher: Answer, targets: Tensor, weights: Tensor, knobs: Mapping[str, float]
    ) -> Tensor:
        temperature, valid = knobs["temperature"], weights > 0
        both = torch.stack(
            [(valid_rows(answer.logits, valid) / temperature).softmax(1) for answer in (student, teacher)]
        )
        losses = knobs["inter"] * _across_classes(both) + knobs["intra"] * _across_samples(both, valid).mean()
        return temperature**2 * losses


def _across_classes(both: Tensor) -> Tensor:
    """1 - the correlation of each sample's two rows of probabilities [2, B, K] to [B]."""
    own, its = both - both.mean(2, keepdim=True)
    return 1 - _cosine((own * its).sum(1), own.square().sum(1), its.square().sum(1))


def _across_samples(both: Tensor, valid: Tensor) -> Tensor:
    """1 - the correlation of each class's probabilities [2, B, K] over the valid samples of all ranks, [K].

    Sums over the samples are all that ranks exchange.
    """
    counts = valid.to(both.dtype)[:, None, None]  # [B, 1, 1]
    rows = both.transpose(0, 1)  # [B, 2, K]
    mean = total(rows * counts) / total(counts).clamp(min=1)
    own, its = ((rows - mean) * counts).unbind(1)
    return 1 - _cosine(*total(torch.stack([own * its, own.square(), its.square()], 1)))


def _cosine(product: Tensor, own: Tensor, its: Tensor) -> Tensor:
    """The cosine between vectors, from their product and squared norms, each with one more entry, of sqrt(FLAT).

    So equal vectors have cosine 1 without a gradient however small they are, zeros included.
    """
    return (product + FLAT) / ((own + FLAT) * (its + FLAT)).sqrt()
