"""Sharpness-aware minimization (Foret et al. 2021): the gradient is taken where the loss is worst nearby."""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from penstock.recipe import Block


class Sam:
    """Moves weights to w + rho g / |g| for a second gradient, and back to exactly what they were."""

    class Config(Block):
        rho: float = Field(0.05, gt=0, description="how far the weights are moved")
        every: int = Field(1, ge=1, description="only each so-manieth step costs two; the others are plain steps")
        adaptive: bool = Field(
            False, description="scale each direction by the weight's size (ASAM, Kwon et al. 2021; rho 0.5 to 2)"
        )

    def __init__(self, config: "Sam.Config"):
        self.config = config
        self._saved: list[Tensor] = []

    def due(self, step: int) -> bool:
        """Whether the step that follows `step` steps is one with two sweeps."""
        return (step + 1) % self.config.every == 0

    @torch.no_grad()
    def climb(self, params: list[nn.Parameter]) -> bool:
        """Move the weights up along their gradients, which are then cleared; False, and no move, if not finite."""
        scales = [param.abs() if self.config.adaptive else None for param in params]
        slopes = [_times(scale, param.grad) for scale, param in zip(scales, params, strict=True)]
        norm = float(nn.utils.get_total_norm(slopes))
        if not math.isfinite(norm):
            return False
        self._saved = [param.clone() for param in params]
        for param, scale, slope in zip(params, scales, slopes, strict=True):
            param.add_(_times(scale, slope), alpha=self.config.rho / (norm + 1e-12))
            param.grad = None
        return True

    @torch.no_grad()
    def back(self, params: list[nn.Parameter]) -> None:
        """Undo `climb`, bit for bit."""
        for param, before in zip(params, self._saved, strict=True):
            param.copy_(before)
        self._saved = []


def _times(scale: Tensor | None, values: Tensor | None) -> Tensor:
    assert values is not None  # gradients were reduced, so each parameter has one
    return values if scale is None else scale * values
