"""Binary cross-entropy over the classes (Beyer et al. 2020; Wightman et al. 2021, "ResNet strikes back")."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from finetune.losses._targets import smoothed
from penstock.recipe import Block

ROUNDING = 1e-6  # a share this small is a rounding error of the smoothing, not a class that was mixed in


class Binary:
    """Each class is a yes or no of its own: an image mixed of two may show both.

    With a threshold every class with a larger share of the (mixed) target counts as shown in full. It looks at the
    shares without the smoothing, which is then applied to what it finds: smoothing gives every class a little, and
    none of that is to count as shown. "ResNet strikes back" takes 0.2, DeiT III 0; both, as timm and torch do, average
    over the classes. Composer and big_vision add them up, which makes the loss K times larger.
    """

    class Config(Block):
        name: Literal["binary"] = "binary"
        smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing: this share is spread over all classes")
        threshold: float | None = Field(
            None, ge=0, lt=0.5, description="a larger share of the target counts as 1, the rest as 0; null keeps shares"
        )
        reduction: Literal["mean", "sum"] = Field("mean", description="over the classes")

    def __init__(self, config: Config):
        self.config = config

    def targets(self, labels: Tensor, classes: int) -> Tensor:
        """Labels, int64 [B], as smoothed targets, fp32 [B, classes]."""
        return smoothed(labels, classes, self.config.smoothing)

    def shown(self, targets: Tensor) -> Tensor:
        """What the logits are compared with [B, K]: the (mixed) targets, after the threshold."""
        if self.config.threshold is None:
            return targets
        kept, spread = 1 - self.config.smoothing, self.config.smoothing / targets.shape[1]
        shown = (targets - spread) / kept > self.config.threshold + ROUNDING
        return shown.to(targets.dtype) * kept + spread

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each sample [B], in nats, in at least fp32."""
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            shown = self.shown(targets).to(logits.dtype)
            losses = F.binary_cross_entropy_with_logits(logits, shown, reduction="none")
            return losses.mean(1) if self.config.reduction == "mean" else losses.sum(1)
