"""An averaged copy of a task in fp32, outside the engine: exponential moving average, stochastic weight averaging.

Averaged weights often do better than the last ones (Polyak and Juditsky 1992; Izmailov et al. 2018).
"""

import copy
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from penstock.engine import Engine
from penstock.recipe import Block
from penstock.schedule import Duration, Length, Tick
from penstock.task import Task

AVERAGE = "average|"
AVERAGED_BUFFER = f"{AVERAGE}buffer|"
COUNT = f"{AVERAGE}count|updates"


class Average:
    """The average of a task's weights over a run.

    Every rank holds the whole copy. Floating-point buffers (running statistics) are averaged as weights are, integers
    copied. With stochastic weight averaging, and with a long average, recalibrate batch norm before evaluation.

    Args:
        task: before an engine is built around it, so that it is whole, and in fp32.

    Attributes:
        module: the averaged task, in evaluation mode and without gradients.
        updates: weights averaged so far; until the first, `module` is the task as it began.
    """

    class Config(Block):
        name: Literal["none", "ema", "swa"] = Field(
            "none", description="ema: exponential moving average; swa: equal weights from `start` on"
        )
        decay: float = Field(0.9999, gt=0, lt=1, description="ema: what an update keeps of the average")
        warmup: bool = Field(True, description="ema: decay min(decay, (1 + n) / (10 + n)) after n updates")
        every: int = Field(1, ge=1, description="optimizer steps per update")
        start: Duration = Field(Length(0.0, "steps"), description="when averaging begins; 75% is usual for swa")

        @model_validator(mode="after")
        def _reached(self) -> "Average.Config":
            if self.start.unit == "%" and self.start.amount >= 100:
                raise ValueError(f"start: {self.start} is the run's end, so nothing would be averaged")
            return self

    def __init__(self, config: "Average.Config", task: Task):
        self.config, self.updates = config, 0
        self.module = copy.deepcopy(task).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, engine: Engine, tick: Tick) -> None:
        """Take in the weights after an applied step, if it is time to. Collective."""
        if tick.now < tick.clock.steps(self.config.start) or tick.step % self.config.every:
            return
        self.module.to(engine.device)
        share, self.updates = self._share(), self.updates + 1
        averages = dict(self.module.named_parameters())
        pairs: list[tuple[Tensor, Tensor]] = [(averages[name], now) for name, now in engine.trained()]
        buffers = dict(engine.task.named_buffers())
        for name, average in self.module.named_buffers():
            if average.is_floating_point():
                pairs.append((average, buffers[name].float()))
            else:
                average.copy_(buffers[name])
        torch._foreach_lerp_([average for average, _ in pairs], [now for _, now in pairs], share)

    def _share(self) -> float:
        """What the new weights count in the next update."""
        config, n = self.config, self.updates
        if config.name == "swa":
            return 1 / (n + 1)
        if n == 0 and config.start.amount > 0:
            return 1.0
        return 1 - (min(config.decay, (1 + n) / (10 + n)) if config.warmup else config.decay)

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Weights and persistent buffers whose names begin with `prefix`, on the CPU."""
        state = self.module.state_dict()
        return {name: value.to("cpu", copy=True) for name, value in state.items() if name.startswith(prefix)}

    # For the checkpoint ---------------------------------------------------------------------------------------------

    def share(self, rank: int, world: int) -> dict[str, Tensor]:
        """This rank's part of a checkpoint: every world-th weight, and its own buffers, by key."""
        named = list(self.module.named_parameters())[rank::world]
        held: dict[str, Tensor] = {f"{AVERAGE}weight|{name}": value for name, value in named}
        held |= {f"{AVERAGED_BUFFER}{name}": value for name, value in self.module.named_buffers()}
        if rank == 0:
            held[COUNT] = torch.tensor(self.updates)
        return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in held.items()}

    @torch.no_grad()
    def load(self, tensor: Callable[[str], Tensor], keys: Iterable[str]) -> None:
        """Go on from what `share` gave, got by key."""
        own: dict[str, Tensor] = {f"{AVERAGE}weight|{name}": value for name, value in self.module.named_parameters()}
        own |= {f"{AVERAGED_BUFFER}{name}": value for name, value in self.module.named_buffers()}
        for key in keys:
            if key == COUNT:
                self.updates = int(tensor(key))
            else:
                own[key].copy_(tensor(key))
