"""Distillation losses and answers for their tests: every loss of the registry, and more of its options."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.distillation import DISTILLATIONS, Answer, Widths
from penstock.schedule import knobs_of
from penstock.task import weighted_mean

ROWS = 6
STUDENT = Widths(classes=5, pooled=4, stages=(3, 2, 3))
TEACHER = Widths(classes=5, pooled=6, stages=(2, 4, 6))
SIDES = {STUDENT: ((6, 5), (4, 4), (2, 2)), TEACHER: ((8, 4), (2, 2), (3, 3))}  # of the stages' maps

# Options beside the defaults; a loss in a new file is tested with its defaults the moment it exists.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "soft_targets, hot": ("soft_targets", {"temperature": 3.0}),
    "soft_targets, standardized": ("soft_targets", {"standardize": True, "temperature": 2.0}),
    "decoupled, imagenet": ("decoupled", {"beta": 0.5, "temperature": 1.0}),
    "dist, hot": ("dist", {"temperature": 2.0, "inter": 0.5}),
    "relational, logits": ("relational", {"on": "logits", "distance": 3.0}),
    "features, stages": ("features", {"on": "stages", "last": 2}),
    "features, mlp": ("features", {"projector": "mlp", "loss": "cosine"}),
    "features, huber": ("features", {"on": "stages", "loss": "smooth_l1", "projector": "mlp"}),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in DISTILLATIONS.names()} | OPTIONS


@dataclass(frozen=True)
class Loss:
    """A loss with the numbers of its recipe."""

    module: Any
    knobs: Mapping[str, float]

    def __call__(
        self, student: Answer, teacher: Answer, targets: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """The loss of each sample, not weighted."""
        rows = len(student.logits)
        targets = labels(rows, student.logits.shape[1]) if targets is None else targets
        weights = torch.ones(rows) if weights is None else weights
        return self.module(student, teacher, targets, weights, self.knobs)

    def mean(
        self, student: Answer, teacher: Answer, targets: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """The mean over the valid samples of one process, as the task takes it."""
        weights = torch.ones(len(student.logits)) if weights is None else weights
        return weighted_mean(self(student, teacher, targets, weights), weights)


def make(name: str, student: Widths = STUDENT, teacher: Widths = TEACHER, **options: Any) -> Loss:
    torch.manual_seed(5)
    kind = DISTILLATIONS.get(name)
    config = kind.Config(**options)
    knobs = {key: float(value) for key, value in knobs_of(config).items()}
    module: nn.Module = kind(config, student, teacher)
    return Loss(module.double(), knobs)


def answer(rows: int, widths: Widths, seed: int) -> Answer:
    """Random answers of some network, fp64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator, dtype=torch.float64)

    sides = SIDES.get(widths, ((4, 4),) * len(widths.stages))
    maps = tuple(random(width, *side) for width, side in zip(widths.stages, sides, strict=True))
    return Answer(2 * random(widths.classes), random(widths.pooled), maps)


def labels(rows: int, classes: int) -> Tensor:
    """Targets [B, K], mixed of two classes, the likelier of which is the row's number modulo K."""
    first = F.one_hot(torch.arange(rows) % classes, classes)
    return (0.7 * first + 0.3 * first.roll(2, 1)).double()


def flat(answer: Answer) -> list[Tensor]:
    assert answer.pooled is not None
    return [answer.logits, answer.pooled, *answer.stages]


def unflat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Answer:
    return Answer(tensors[0], tensors[1], tuple(tensors[2:]))


def rows_of(answer: Answer, index: Tensor) -> Answer:
    return unflat([each[index] for each in flat(answer)])


def leaf(answer: Answer) -> Answer:
    """The same numbers, of which gradients can be asked."""
    return unflat([each.detach().clone().requires_grad_() for each in flat(answer)])


def gradients(answer: Answer) -> list[Tensor]:
    return [torch.zeros_like(each) if each.grad is None else each.grad for each in flat(answer)]


def setting(case: str, rows: int = ROWS) -> tuple[Loss, Answer, Answer]:
    """A case's loss, and random answers of student and teacher."""
    name, options = CASES[case]
    return make(name, **options), answer(rows, STUDENT, 1), answer(rows, TEACHER, 2)


def step(loss: Loss, student: Answer, *args: Any) -> tuple[Tensor, list[Tensor]]:
    """The mean loss, and its gradient by the student's answer and the loss's own weights."""
    student = leaf(student)
    loss.module.zero_grad()
    value = loss.mean(student, *args)
    value.backward()
    own = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in loss.module.parameters()]
    return value.detach(), gradients(student) + own
