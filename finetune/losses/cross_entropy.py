"""Cross-entropy with soft targets."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from finetune.losses._targets import smoothed
from penstock.recipe import Block


class CrossEntropy:
    """Cross-entropy between soft targets and the softmax of the logits."""

    class Config(Block):
        name: Literal["cross_entropy"] = "cross_entropy"
        smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing: this share is spread over all classes")

    def __init__(self, config: Config):
        self.config = config

    def targets(self, labels: Tensor, classes: int) -> Tensor:
        """Labels, int64 [B], as smoothed targets, fp32 [B, classes]."""
        return smoothed(labels, classes, self.config.smoothing)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each sample [B], in nats, in at least fp32."""
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return -(targets * logits.log_softmax(1)).sum(1)
