"""The whole contract between a stage and the loop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from penstock.backbones import Backbone
    from penstock.streams.batch import Batch


@dataclass(frozen=True)
class StepOutput:
    """What one micro-batch gives.

    `loss` is the mean over this rank's valid samples (weight > 0); `weight` their number. The engine scales it so that
    the optimizer sees the mean over the valid samples of the whole global batch, however they are spread over ranks
    and micro-batches. A batch with no valid sample gives weight 0 and a loss that still touches every parameter.
    """

    loss: Tensor
    weight: Tensor  # float scalar
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # detached scalars, means over valid samples


class Task(nn.Module):
    """Model and loss together. A subclass holds a nested `Config` with its options, and is one file.

    Fields of `Config` typed `Knob` may follow a curve; their values of the step arrive in `forward` as `knobs`.
    """

    backbone: "Backbone"
    looks_across_samples: ClassVar[bool] = False  # a contrastive loss: accumulation would shrink its batch
    collapse_loss: float | None = None  # the loss of a network that ignores its input, where it is known

    def forward(self, batch: "Batch", knobs: Mapping[str, float]) -> StepOutput:
        raise NotImplementedError

    @classmethod
    def conflicts(cls, recipe: Any) -> list[str]:
        """What in a recipe this task cannot work with; each says the key, the value and what to write instead."""
        return []

    def before_step(self, time: float, knobs: Mapping[str, float]) -> None:
        """Called before each optimizer step, at a nominal time (`Tick.now`): modes and probabilities that change."""

    def after_step(self, engine: Any, knobs: Mapping[str, float]) -> None:
        """Called after each applied optimizer step: EMA teachers, queues, centres."""

    def compiled_parts(self) -> list[nn.Module]:
        """The submodules that `engine.compile` compiles: those called with tensors of fixed shapes."""
        return [self.backbone]

    def pictures(self, batch: "Batch") -> dict[str, Tensor]:
        """Named pictures for people, uint8 [3, H, W]."""
        return {}


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of per-sample values [B] over samples of weight > 0; 0, still in the graph, when there are none."""
    return (torch.where(weights > 0, values, torch.zeros_like(values)) * weights).sum() / weights.sum().clamp(min=1)
