"""Relational knowledge distillation, RKD (Park et al. 2019)."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from finetune.distillation import Answer, Widths
from finetune.distillation._knobs import not_negative
from finetune.distillation._ranks import total, valid_rows
from penstock import distributed
from penstock.recipe import Block
from penstock.schedule import Knob

NUMBERS = 2**24  # that the angles at some samples may fill at once, 64 MB


class Relational(nn.Module):
    """The samples of all ranks lie to each other as they do for the teacher: in distances and in angles.

    Distances are in units of their mean over the pairs of different samples. Both losses are Huber's, averaged over
    all N^2 pairs and N^3 triplets, those of a sample with itself included, as in the authors' code; to the loss of a
    sample belong the pairs that begin at it, and the angles whose vertex it is.
    """

    stages, looks_across_samples = 0, True

    class Config(Block):
        name: Literal["relational"] = "relational"
        weight: Knob = Field(1.0, description="of this loss in the sum; the paper's, with the two below")
        distance: Knob = Field(25.0, description="of the distances; the paper's for classification")
        angle: Knob = Field(50.0, description="of the angles; the paper's for classification")
        on: Literal["pooled", "logits"] = Field("pooled", description="what is compared; a cached teacher has logits")

        _weights = field_validator("weight", "distance", "angle")(not_negative)

    def __init__(self, config: Config, student: Widths, teacher: Widths):
        super().__init__()
        self.config = config
        self.features, self.raw_logits = config.on == "pooled", config.on == "logits"

    def forward(
        self, student: Answer, teacher: Answer, targets: Tensor, weights: Tensor, knobs: Mapping[str, float]
    ) -> Tensor:
        valid = weights > 0
        own, its = (valid_rows(getattr(answer, self.config.on), valid) for answer in (student, teacher))
        counts = distributed.gather(valid.to(own.dtype))
        samples = counts.sum().clamp(min=1)
        everyone = distributed.gather(own), distributed.gather(its)
        lengths, angles = [], []
        for begin, end in _parts(len(own), max(everyone[0].shape[1], everyone[1].shape[1], len(counts)), len(counts)):
            found = _Relations.apply(own[begin:end], everyone[0], its[begin:end], everyone[1], counts)
            lengths.append(found[0])
            angles.append(found[1])
        distance = torch.cat(lengths, 1) * valid.to(own.dtype)[:, None]  # [2, B, N]
        mean = total(distance.sum(2).T) / (samples * (samples - 1)).clamp(min=1)
        mean = torch.where(mean > 0, mean, torch.ones_like(mean))
        apart, wanted = distance / mean[:, None, None]
        distances = F.smooth_l1_loss(apart, wanted, reduction="none").sum(1)
        return knobs["distance"] * distances / samples + knobs["angle"] * torch.cat(angles) / samples**2


def _parts(rows: int, width: int, others: int) -> list[tuple[int, int]]:
    """Ranges of rows whose relations [rows, others, width] hold few enough numbers."""
    step = max(1, NUMBERS // (width * others))
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


class _Relations(torch.autograd.Function):
    """`_relations`, computed again in the backward pass: the angles at one part of the samples are held at a time.

    torch.utils.checkpoint would do, and import the compiler first, which takes seconds.
    """

    @staticmethod
    def forward(ctx: Any, *points: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*points)
        return _relations(*points)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        own, all_own, *rest = ctx.saved_tensors
        with torch.enable_grad():
            students = own.detach().requires_grad_(), all_own.detach().requires_grad_()
            found = _relations(*students, *rest)
        return *torch.autograd.grad(found, students, gradients), None, None, None


def _relations(own: Tensor, all_own: Tensor, its: Tensor, all_its: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Of V samples: both networks' distances to all N [2, V, N], and the sum of Huber's loss of the angles there [V].

    What is not valid, 0 in `counts` [N], has distance 0, and makes no angles.
    """
    lengths, cosines = [], []
    for some, everyone in ((own, all_own), (its, all_its)):
        length, direction = _directions(some, everyone)
        direction = direction * counts[:, None]
        lengths.append(length * counts)
        cosines.append(direction @ direction.transpose(1, 2))  # [V, N, N]
    return torch.stack(lengths), F.smooth_l1_loss(cosines[0], cosines[1], reduction="none").sum((1, 2))


def _directions(some: Tensor, everyone: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [V, N] and unit vectors [V, N, D] from V points to N; both 0, without gradient, where they coincide."""
    difference = everyone - some[:, None]
    square = difference.square().sum(2)
    apart = square > 0
    inverse = torch.where(apart, square, torch.ones_like(square)).rsqrt() * apart
    return square * inverse, difference * inverse[..., None]
