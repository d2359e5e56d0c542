"""Distillation losses, one file each: what a student learns from its teacher's answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from penstock.registry import Registry

DISTILLATIONS = Registry("finetune.distillation")


class Answer(NamedTuple):
    """What a network says of B images. A teacher's holds no gradient; a cached one has logits alone."""

    logits: Tensor  # fp32 [B, K]; of the distillation token, where the student has one
    pooled: Tensor | None = None  # [B, D]
    stages: tuple[Tensor, ...] = ()  # maps [B, C, h, w] by depth, the last one deepest; as many as losses ask for


@dataclass(frozen=True)
class Widths:
    """The widths of a network's answers, for losses that have weights of their own."""

    classes: int
    pooled: int
    stages: tuple[int, ...] = ()  # channels of `Answer.stages`


class Distillation(Protocol):
    """A loss between two networks, an `nn.Module`; its own weights, if any, train with the student.

    The config's fields typed `Knob` may follow curves; `weight` is one of them, applied by the task.

    Attributes:
        features: whether `Answer.pooled` is needed, which a cached teacher does not have.
        stages: how many of the last stages are needed, 0 for none.
        looks_across_samples: whether it compares samples with each other; of all ranks, and of one micro-batch.
        raw_logits: whether it needs the logits of all classes, however unlikely; a cache that keeps the likeliest
            classes alone does not have them.
    """

    config: Any
    features: bool
    stages: int
    looks_across_samples: bool
    raw_logits: bool

    def __init__(self, config: Any, student: Widths, teacher: Widths): ...

    def __call__(
        self, student: Answer, teacher: Answer, targets: Tensor, weights: Tensor, knobs: Mapping[str, float]
    ) -> Tensor:
        """The loss of each sample [B], in at least fp32; the task takes its mean over the valid ones of all ranks.

        Args:
            targets: the labels' soft targets [B, K], mixed as the images are.
            weights: [B]; samples of weight 0 must not count, nor change what is said of others.
        """
        ...
