"""From a worker to the training process: the views of a batch in one piece of shared memory, small tensors by value.

Each tensor that is shared costs a file descriptor and a connection between the processes, about as much as a decode.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

SMALL = 1 << 16  # bytes that are sent by value
OF_NUMPY = {torch.from_numpy(np.empty(0, kind)).dtype for kind in "?bBhHiIlLefdFD"}  # not bfloat16, not 8-bit floats
Piece = tuple[Tensor, list[tuple[int, torch.Size]]]  # flat memory, and where the views lie in it


def room_for(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Tensors uint8 of these shapes, not filled, in one piece of memory; in a worker, of memory that can be shared."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    total = sum(sizes)
    flat = torch.empty(0 if get_worker_info() else total, dtype=torch.uint8)
    if get_worker_info():  # filled in place, as torch's default_collate does: a copy would follow otherwise
        flat.set_(torch.UntypedStorage._new_shared(total))
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


def packed(views: list[Tensor]) -> Piece | list[Tensor]:
    """As one piece where they lie in one."""
    storage = views[0].untyped_storage() if views else None
    if storage is None or not all(
        view.is_contiguous() and view.dtype == torch.uint8 and view.untyped_storage().data_ptr() == storage.data_ptr()
        for view in views
    ):
        return views
    flat = torch.empty(0, dtype=torch.uint8).set_(storage)
    return flat, [(int(view.storage_offset()), view.shape) for view in views]


def unpacked(views: Piece | list[Tensor]) -> list[Tensor]:
    """The inverse of `packed`."""
    if isinstance(views, list):
        return views
    flat, places = views
    return [flat[offset : offset + shape.numel()].view(shape) for offset, shape in places]


def by_value(value: Any) -> Any:
    """Small tensors, and those in a dictionary, as arrays; anything else as it is."""
    if isinstance(value, dict):
        return {name: by_value(each) for name, each in value.items()}
    small = isinstance(value, Tensor) and value.nbytes <= SMALL and value.dtype in OF_NUMPY
    return value.numpy() if small else value


def to_tensors(value: Any) -> Any:
    """The inverse of `by_value`."""
    if isinstance(value, dict):
        return {name: to_tensors(each) for name, each in value.items()}
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
