"""How good a classifier's answers are: exact, from the logits of every validation sample."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.errors import InputError
from penstock.reliability import reliability

CHUNK = 4096  # rows in fp64 at a time
TOP5_FROM = 10  # classes; with fewer, the right one is nearly always among five


class Judged(NamedTuple):
    """What is measured of each sample, [n] each."""

    correct: Tensor  # bool, the largest logit is the label's
    among5: Tensor  # bool, the label's logit is among the five largest
    confidence: Tensor  # fp64, the probability of the answer
    nll: Tensor  # fp64, minus the log-probability of the label, in nats
    brier: Tensor  # fp64, squared distance of the probabilities from the label's, in [0, 2] (Brier 1950)


def judge(logits: Tensor, labels: Tensor) -> Judged:
    """Judge each sample, in fp64.

    Args:
        logits: [n, K].
        labels: int64 [n], classes in [0, K).
    """
    chunks = [_judge(*pair) for pair in zip(logits.split(CHUNK), labels.split(CHUNK), strict=True)]
    return Judged(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _judge(logits: Tensor, labels: Tensor) -> Judged:
    logs = logits.double().log_softmax(1)
    probabilities = logs.exp()
    confidence, answer = probabilities.max(1)
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    truth = labels[:, None]
    right = probabilities.gather(1, truth)[:, 0]
    return Judged(
        correct=answer == labels,
        among5=(best == truth).any(1),
        confidence=confidence,
        nll=-logs.gather(1, truth)[:, 0],
        brier=(probabilities.square().sum(1) - right.square()) + (1 - right).square(),
    )


def classification_metrics(logits: Tensor, labels: Tensor, keys: Sequence[str] | None = None) -> dict[str, float]:
    """`top1`, `top5` (from 10 classes on) and `ece` (15 bins) in per cent, `nll` in nats, `brier` in [0, 2].

    Give the samples of all ranks, each once: a mean of means over ranks is not exact.

    Args:
        logits: [n, K].
        labels: int64 [n]; one outside [0, K) is an InputError.
        keys: the samples' names, for the error.
    """
    check_labels(labels, logits.shape[1], keys)
    judged = judge(logits, labels)
    found = {"top1": 100 * judged.correct.double().mean().item()}
    if logits.shape[1] >= TOP5_FROM:
        found["top5"] = 100 * judged.among5.double().mean().item()
    return found | {
        "nll": judged.nll.mean().item(),
        "ece": 100 * reliability(judged.confidence, judged.correct).error,
        "brier": judged.brier.mean().item(),
    }


def per_class_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The per cent of each class's samples that are answered rightly: fp64 [K], NaN for a class without samples."""
    classes = logits.shape[1]
    correct = logits.argmax(1) == labels
    return 100 * labels[correct].bincount(minlength=classes).double() / labels.bincount(minlength=classes)


def check_labels(labels: Tensor, classes: int, keys: Sequence[str] | None = None) -> None:
    """Raise InputError, naming the first sample, unless there are labels and all are in [0, classes)."""
    if len(labels) == 0:
        raise InputError("there is no labelled sample to measure accuracy on; give a validation set that is not empty")
    wrong = ((labels < 0) | (labels >= classes)).nonzero()[:, 0].tolist()
    if not wrong:
        return
    label = int(labels[wrong[0]])
    sample = f"sample {keys[wrong[0]]!r}" if keys else f"sample number {wrong[0]}"
    more = f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
    if label < 0:
        raise InputError(f"{sample}{more} has no label; give a set in which every image has one")
    raise InputError(
        f"{sample}{more} has label {label}, but the classifier has {classes} classes, 0 to {classes - 1}; "
        "pack the set with the classes of the training set"
    )
