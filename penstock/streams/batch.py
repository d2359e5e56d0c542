"""What a stream hands to the loop."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from penstock.streams.handover import Piece, by_value, packed, to_tensors, unpacked


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank. Its size never changes: a sample that cannot be read is a slot of weight 0."""

    views: list[Tensor]  # per view: uint8 [B, C, H, W]; views may differ in H and W
    labels: Tensor  # int64 [B], -1 where there is none
    weights: Tensor  # float32 [B], 1 for a real sample, 0 for a slot that must not count
    positions: Tensor  # int64 [B], place in the endless order; keys what is random, but for views of a pool
    keys: list[str] = field(default_factory=list)  # the samples' names, for people
    step: int = 0  # optimizer step this micro-batch belongs to
    begin: int = 0  # position of the first sample that any rank has in this micro-batch
    faults: list[dict] = field(default_factory=list)  # per slot of weight 0: position, shard, key, kind, reason
    ids: Tensor | None = None  # int64 [B], the bits of the samples' 64-bit ids; for the epoch's digest
    extra: dict[str, Tensor] = field(default_factory=dict)  # [B, ...], what a sidecar or a stage gave
    members: dict[str, list[Any]] = field(default_factory=dict)  # B values, of any type; None where there is none
    timing: dict[str, float] = field(default_factory=dict)  # what making it took (penstock/streams/timing.py)

    def __len__(self) -> int:
        return len(self.weights)

    def __reduce__(self) -> tuple[Any, ...]:
        """How workers send it (penstock/streams/handover.py)."""
        rest = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("views", "members")}
        return _received, (packed(self.views), by_value(rest), self.members)

    def pin_memory(self) -> "Batch":
        """In page-locked memory, from which a copy to the GPU is asynchronous; called by the data loader."""
        return replace(
            self,
            views=[view.pin_memory() for view in self.views],
            labels=self.labels.pin_memory(),
            weights=self.weights.pin_memory(),
            positions=self.positions.pin_memory(),
            extra={name: values.pin_memory() for name, values in self.extra.items()},
        )

    def to(self, device: torch.device) -> "Batch":
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            views=[move(view) for view in self.views],
            labels=move(self.labels),
            weights=move(self.weights),
            positions=move(self.positions),
            extra={name: move(values) for name, values in self.extra.items()},
        )


def _received(views: Piece | list[Tensor], rest: dict[str, Any], members: dict[str, list[Any]]) -> Batch:
    return Batch(views=unpacked(views), members=members, **to_tensors(rest))
