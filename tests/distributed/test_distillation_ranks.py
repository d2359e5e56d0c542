"""Distillation losses on 1, 2 and 4 ranks with different data against one process that has the valid samples alone."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from finetune.distillation import Answer
from penstock import distributed
from penstock.task import StepOutput, weighted_mean
from tests.distillation import CASES, STUDENT, TEACHER, Loss, answer, flat, labels, make, rows_of, unflat

VALID = {
    "all": [1, 1, 1, 1, 1, 1, 1, 1],
    "a slot of weight 0": [1, 1, 1, 1, 1, 0, 1, 1],
    "a rank has none": [1, 1, 0, 0, 1, 0, 1, 1],
    "one in all": [0, 0, 0, 0, 0, 0, 1, 0],
}
ROWS = 8


class Student(nn.Module):
    """Scales and shifts every answer, so that what reaches each of its weights can be compared."""

    def __init__(self, example: Answer):
        super().__init__()
        torch.manual_seed(9)
        shapes = [each.shape[1:] for each in flat(example)]
        self.scale = nn.ParameterList(1 + 0.3 * torch.randn(shape, dtype=torch.float64) for shape in shapes)
        self.shift = nn.ParameterList(0.3 * torch.randn(shape, dtype=torch.float64) for shape in shapes)

    def forward(self, given: Answer) -> Answer:
        together = zip(flat(given), self.scale, self.shift, strict=True)
        return unflat([each * scale + shift for each, scale, shift in together])


def _setting(case: str) -> tuple[Loss, Student, Answer, Answer, Tensor]:
    name, options = CASES[case]
    given, taught = answer(ROWS, STUDENT, 1), answer(ROWS, TEACHER, 2)
    return make(name, **options), Student(given), given, taught, labels(ROWS, STUDENT.classes)


def _numbers(loss: Tensor, module: nn.Module, student: Student, grad_scale: float = 1.0) -> dict[str, np.ndarray]:
    found = {"loss": loss}
    for prefix, part in (("student", student), ("loss", module)):
        for name, param in part.named_parameters():
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            found[f"{prefix}.{name}"] = distributed.all_sum(grad) * grad_scale
    return {name: value.detach().numpy().copy() for name, value in found.items()}


def _rank_steps(rank: int, world: int, valid: list[int]) -> dict[str, dict[str, np.ndarray]]:
    return {case: _rank_step(rank, world, case, valid) for case in CASES}


def _rank_step(rank: int, world: int, case: str, valid: list[int]) -> dict[str, np.ndarray]:
    """One step with the engine's arithmetic: the loss scaled by w_r W / N, then gradients averaged over ranks."""
    loss, student, given, taught, targets = _setting(case)
    mine = torch.arange(ROWS).chunk(world)[rank]
    weights = torch.tensor(valid, dtype=torch.float32)[mine]
    losses = loss(student(rows_of(given, mine)), rows_of(taught, mine), targets[mine], weights)
    output = StepOutput(weighted_mean(losses, weights), weights.sum())
    total = distributed.all_sum(output.weight)
    (output.loss * output.weight * world / total).backward()
    mean = distributed.all_sum(output.loss * output.weight) / total
    return _numbers(mean, loss.module, student, 1 / world)


def _one_process(case: str, valid: list[int]) -> dict[str, np.ndarray]:
    loss, student, given, taught, targets = _setting(case)
    keep = torch.tensor(valid) > 0
    mean = loss(student(rows_of(given, keep)), rows_of(taught, keep), targets[keep]).mean()
    mean.backward()
    return _numbers(mean, loss.module, student)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("valid", VALID.values(), ids=VALID)
def test_value_and_gradients_equal_one_process(ranks, world, valid):
    expected = {case: _one_process(case, valid) for case in CASES}
    parts = [_rank_steps(0, 1, valid)] if world == 1 else ranks(world).run(_rank_steps, valid)
    for part in parts:
        for case, numbers in expected.items():
            assert part[case].keys() == numbers.keys()
            for name, value in numbers.items():
                where = f"{case}: {name}"
                np.testing.assert_allclose(part[case][name], value, rtol=1e-9, atol=1e-12, err_msg=where)


def _all_losses_at_once(rank: int, world: int) -> list[np.ndarray]:
    """The gradient of a sum of all losses: what the backward passes of several exchange must not mix up."""
    student = Student(answer(ROWS, STUDENT, 1))
    mine = torch.arange(ROWS).chunk(world)[rank]
    own, its = student(rows_of(answer(ROWS, STUDENT, 1), mine)), rows_of(answer(ROWS, TEACHER, 2), mine)
    losses = [make(name, **options)(own, its, labels(ROWS, 5)[mine]) for name, options in CASES.values()]
    torch.stack(losses).sum(0).mean().backward()
    summed = [distributed.all_sum(param.grad) for param in student.parameters() if param.grad is not None]
    return [(each / world).numpy() for each in summed]


def test_several_losses_in_one_backward_pass(ranks):
    expected = _all_losses_at_once(0, 1)
    for part in ranks(2).run(_all_losses_at_once):
        for found, wanted in zip(part, expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)
