"""Label smoothing."""

import torch
from torch import Tensor


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """1 - s + s / K at the label and s / K elsewhere (Szegedy et al. 2016): fp32 [B, classes]; rows add up to 1.

    Compared instead of indexed: a label of -1, of a slot that does not count, needs no case of its own.
    """
    hot = (labels[:, None] == torch.arange(classes, device=labels.device)).float()
    return hot * (1 - smoothing) + smoothing / classes if smoothing else hot
