"""Whether two forms of one network agree: counted, image by image."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from penstock.errors import InputError

TOLERANCE = 1e-4  # of max(1, |logit|), for forms that compute in fp32
EXPORTED = "exported"  # the network in the export folder
Answers = Callable[[Tensor], Tensor]  # uint8 images [B, C, H, W] to logits [B, K], or features
Outputs = Callable[[Tensor], dict[str, Tensor]]  # to all outputs of a form, by name


@dataclass
class Agreement:
    """Of a form with the exported network."""

    images: int = 0
    largest: float = 0.0  # difference of a logit, relative to max(1, |logit|)
    differ: int = 0  # images whose largest answer is another one: another label
    labelled: int = 0
    correct: int = 0  # of these

    @property
    def top1(self) -> float | None:
        """In per cent."""
        return 100 * self.correct / self.labelled if self.labelled else None

    def add(self, answers: Tensor, reference: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            answers: logits [B, K], like `reference`.
            labels: int64 [B], -1 where there is none.
        """
        self.images += len(answers)
        self.largest = max(self.largest, difference(answers, reference))
        said = answers.argmax(1)
        self.differ += int((said != reference.argmax(1)).sum())
        self.labelled += int((labels >= 0).sum())
        self.correct += int((said == labels).sum())


def difference(answers: Tensor, reference: Tensor) -> float:
    """The largest, relative to max(1, |reference|); infinite where an answer is not finite."""
    apart = (answers.double() - reference.double()).abs() / reference.double().abs().clamp(min=1)
    return float(torch.where(apart.isfinite(), apart, torch.inf).max())


def compare(
    forms: Mapping[str, Answers], reference: Answers, batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Agreement]:
    """How each form agrees with the reference, over all batches of (images, labels); itself under `EXPORTED`."""
    found = {EXPORTED: Agreement(), **{name: Agreement() for name in forms}}
    for images, labels in batches:
        want = reference(images)
        found[EXPORTED].add(want, want, labels)
        for name, answers in forms.items():
            found[name].add(answers(images), want, labels)
    return found


def check(name: str, outputs: Outputs, reference: Outputs, images: Tensor) -> None:
    """InputError where a form does not compute what the network does, or that is not finite."""
    for part in (images, images[:1]):
        got, want = outputs(part), reference(part)
        if not all(value.isfinite().all() for value in want.values()):
            raise InputError(f"the network's own answers are not finite: it has diverged; {name} is not written")
        for kind, value in want.items():
            apart = difference(got[kind], value)
            if not apart <= TOLERANCE:
                raise InputError(
                    f"{name} gives {kind} that are {apart:.1e} from the network's, more than {TOLERANCE:g}; it is not "
                    "written. The network does something that this form does not know; leave the form out with --to"
                )


def latencies(forms: Mapping[str, Answers], images: Tensor, seconds: float = 2.0) -> dict[str, float]:
    """Milliseconds that each form takes for these images: medians of rounds in turn, so that all share disturbances."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for answers in forms.values():
        answers(images)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(forms))]) < 3:
        for name, answers in forms.items():
            begin = time.perf_counter()
            answers(images)
            times[name].append(time.perf_counter() - begin)
    return {name: 1000 * median(taken) for name, taken in times.items()}
