"""What stages put into samples: the names, and the shapes of tensors, which every sample must have alike."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from penstock.errors import InputError

Shape = tuple[torch.Size, torch.dtype]


class Kinds:
    """Learned of one sample; batches hold just these names, whatever ranks and workers have seen.

    Args:
        sample: after all stages, with its `__key__`.
        makers: by name, the stage that gave a value last.
    """

    def __init__(self, sample: Mapping[str, Any], makers: Mapping[str, str]):
        self.key, self.makers = sample["__key__"], makers
        self.shapes = {name: _shape(value) for name, value in sample.items() if not _is_own(name)}  # None: no tensor

    def check(self, sample: Mapping[str, Any], makers: Mapping[str, str]) -> None:
        """Raise InputError where a sample has other tensors, or a name that is not known."""
        for name in (*self.shapes, *sample):
            if _is_own(name):
                continue
            shape = _shape(sample.get(name))
            if name in self.shapes and shape == self.shapes[name]:
                continue
            maker = makers.get(name) or self.makers.get(name, "")
            known = _said(self.shapes[name]) if name in self.shapes else "absent"
            raise InputError(
                f"data.stages: {maker}, at sample {sample['__key__']}: {name!r} is "
                f"{_said(shape) if name in sample else 'absent'}, but {known} at sample {self.key}. Give every sample "
                "the same names, None where there is nothing, and tensors one shape and type, as they are stacked; "
                "NumPy arrays are handed over in a list, and may differ"
            )

    def collated(
        self, found: Sequence[Mapping[str, Any] | None], wanted: Iterable[str]
    ) -> tuple[dict[str, torch.Tensor], dict[str, list[Any]]]:
        """Tensors stacked, with zeros in slots without sample; anything else as lists with None there."""
        tensors = {
            name: torch.stack([torch.zeros(shape[0], dtype=shape[1]) if s is None else s[name].detach() for s in found])
            for name, shape in self.shapes.items()
            if shape is not None
        }
        names = [name for name in dict.fromkeys([*wanted, *self.shapes]) if name not in tensors]
        return tensors, {name: [None if s is None else s.get(name) for s in found] for name in names}


def _shape(value: Any) -> Shape | None:
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else None


def _said(shape: Shape | None) -> str:
    return "no tensor" if shape is None else f"a tensor {str(shape[1]).removeprefix('torch.')} {list(shape[0])}"


def _is_own(name: str) -> bool:
    """Whether a key of a sample is the stream's, or webdataset's, and no member."""
    return name in ("views", "label") or name.startswith("__")
