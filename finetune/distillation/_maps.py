"""What losses that compare maps share."""

import torch.nn.functional as F
from torch import Tensor

from finetune.distillation import Widths
from penstock.errors import InputError


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [B, C, h, w] averaged to the smaller height and the smaller width of the two."""
    (a, b), (c, d) = student.shape[2:], teacher.shape[2:]
    size = (min(a, c), min(b, d))
    small = [maps if maps.shape[2:] == size else F.adaptive_avg_pool2d(maps, size) for maps in (student, teacher)]
    return small[0], small[1]


def check_stages(loss: str, last: int, student: Widths, teacher: Widths) -> None:
    """Raises InputError where a network has fewer than `last` stages."""
    for who, widths in (("the student", student), ("the teacher", teacher)):
        if len(widths.stages) < last:
            raise InputError(
                f"task.losses.{loss}.last: {last} stages are to be compared, and {who} shows {len(widths.stages)}; "
                f"set it to {len(widths.stages)} or less"
            )
