"""What losses that look across samples share."""

import torch
from torch import Tensor

from penstock import distributed


def total(rows: Tensor) -> Tensor:
    """The sum over the rows of all ranks, [B, ...] to [...], with gradient."""
    return distributed.gather(rows.sum(0, keepdim=True)).sum(0)


def valid_rows(rows: Tensor, valid: Tensor) -> Tensor:
    """Rows [B, D] with zeros where `valid`, bool [B], is not: whatever stood there changes no value or gradient."""
    return torch.where(valid[:, None], rows, torch.zeros_like(rows))
