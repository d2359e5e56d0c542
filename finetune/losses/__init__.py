"""Losses of a classifier, one file each.

A loss makes the targets as well: `targets(labels, classes)` applies label smoothing, there and nowhere else, before
images are mixed; `loss(logits, targets)` compares.
"""

from typing import Any, Protocol

from torch import Tensor

from penstock.registry import Registry

LOSSES = Registry("finetune.losses")


class Loss(Protocol):
    """What a classification task needs."""

    config: Any

    def targets(self, labels: Tensor, classes: int) -> Tensor:
        """Labels, int64 [B], as smoothed targets, fp32 [B, classes]. A label of -1 (none) is no class's."""
        ...

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss [B] of each sample in at least fp32, of logits [B, K] and (mixed) targets [B, K]."""
        ...
