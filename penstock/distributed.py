"""Who am I among the ranks, and exact arithmetic across them. Every function works in a single process, too."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def started() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if started() else int(os.environ.get("RANK", 0))


def world() -> int:
    return dist.get_world_size() if started() else int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def all_sum(values: Tensor) -> Tensor:
    """Sum over ranks, without gradient; returns a new tensor."""
    total = values.detach().clone()
    if started() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def broadcast(value: Any, source: int = 0) -> Any:
    """A small Python object from one rank to all. It is pickled between our own processes only."""
    if not started() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def collect(value: Any) -> list[Any]:
    """A small Python object of every rank, on every rank, in rank order."""
    if not started() or dist.get_world_size() == 1:
        return [value]
    boxes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, value)
    return boxes


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Every rank's loss depends on every rank's rows, so a row's gradient is the sum over the ranks' losses.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(values: Tensor) -> Tensor:
    """Rows of all ranks in rank order, [B, ...] to [B * world, ...], with gradient. B must be equal on all ranks."""
    if not started() or dist.get_world_size() == 1:
        return values
    return _Gather.apply(values)
