"""Decays that optimizers lack: towards the weights a run started from, and cautious decay.

Both work on the tensors the optimizer itself holds, element by element, around its step: whole parameters at ZeRO-0,
this rank's fp32 pieces at the other stages. So they are the same at every stage, and cost no communication.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Decay:
    """Applies a group's `l2_sp` and `cautious_decay` at each step of an optimizer.

    L2-SP (Li, Grandvalet and Davoine 2018), decoupled from the gradient as AdamW's decay is: before the update
    `w -= lr * l2_sp * (w - start)`. Cautious decay (Chen et al. 2025): after the update, `w -= lr * cautious_decay * w`
    only where the update also moved w towards 0, with the w of before it.

    Args:
        anchored: the optimizer's tensors that `l2_sp` pulls. What they hold now is the start: build this before a
            checkpoint is loaded, and a resumed run is pulled to the same place.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, anchored: Iterable[Tensor]):
        self.start = {tensor: tensor.detach().clone() for tensor in anchored}
        self._before: dict[Tensor, Tensor] = {}
        optimizer.register_step_pre_hook(self._pull)
        optimizer.register_step_post_hook(self._decay)

    @torch.no_grad()
    def _pull(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if group["l2_sp"]:
                    tensor.lerp_(self.start[tensor], group["lr"] * group["l2_sp"])
                if group["cautious_decay"]:
                    self._before[tensor] = tensor.clone()

    @torch.no_grad()
    def _decay(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        for group in optimizer.param_groups:
            for tensor in group["params"] if group["cautious_decay"] else ():
                before = self._before.pop(tensor)
                towards_zero = (before - tensor) * before >= 0
                tensor.sub_(before * towards_zero, alpha=group["lr"] * group["cautious_decay"])
