"""What of a pretrained network trains: each file holds one way, chosen by the recipe's `transfer.name`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from penstock.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from penstock.schedule import Clock
    from penstock.task import Task

TRANSFERS = Registry("finetune.transfer")


class Transfer:
    """One way of transfer; the methods' defaults train everything.

    Attributes:
        closed: modules of the task that do not train, with the nominal time at which they open (infinity: never).
            Until then they are in eval mode: no dropout, no drop path, and batch statistics that stay as they were.
    """

    def __init__(self, config: Any):
        self.config = config
        self.closed: dict[str, float] = {}

    def prepare(self, task: Task, clock: Clock) -> None:
        """Settle which parameters of `task` train; called once, before the optimizer and the engine are built.

        Raises:
            InputError: the network has no such parts.
        """

    def opens(self, task: Task, clock: Clock) -> dict[str, float]:
        """Parameters that move only from a nominal time on, by name, for `penstock.optim.parameter_groups`."""
        return {}

    def set_mode(self, task: nn.Module, time: float) -> None:
        """Put what is closed at nominal `time` in eval mode, and what has opened in training mode.

        Called after `task.train()` and before each step; a task in eval mode is left alone.
        """
        if not task.training:
            return
        for name, opens in self.closed.items():
            module = task.get_submodule(name)
            if module.training != (opens <= time):
                module.train(opens <= time)

    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The task's weights under the names of the network without adapters, for exports."""
        return dict(state)


def trained_share(task: nn.Module) -> str:
    """How many parameters train, for people. Called before the engine is built: ZeRO-3 cuts parameters up."""
    total = sum(param.numel() for param in task.parameters())
    trained = sum(param.numel() for param in task.parameters() if param.requires_grad)
    return f"{trained:,} of {total:,} parameters train ({100 * trained / max(total, 1):.3g} %)"
