"""Distillation losses beside what the public reference codes give, in value and gradient."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from finetune.distillation import Answer, Widths
from tests.distillation import make
from tests.numerics.golden.make_distillation import (
    CLASSES,
    DIST,
    DKD,
    RKD,
    ROWS,
    labels,
    logits,
    pooled,
    result,
    stages,
)

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("distillation.json").read_text(encoding="utf-8"))
OWN = Widths(CLASSES, 5, (6, 9, 12))
ITS = Widths(CLASSES, 8, (12, 18, 24))


def numbers(name, student, teacher, inputs, **options):
    loss = make(name, OWN, ITS, **options)
    return result(loss.mean(student, teacher, F.one_hot(labels(), CLASSES), torch.ones(ROWS)), inputs)


@pytest.mark.parametrize("case", DKD)
def test_decoupled(case):
    alpha, beta, temperature = DKD[case]
    guess = logits("student").requires_grad_()
    options = {"alpha": alpha, "beta": beta, "temperature": temperature}
    found = numbers("decoupled", Answer(guess), Answer(logits("teacher")), [guess], **options)
    assert found == pytest.approx(GOLDEN["decoupled"][case], rel=1e-10)


@pytest.mark.parametrize("case", RKD)
def test_relational(case):
    distance, angle = RKD[case]
    features, guess = pooled("student").requires_grad_(), logits("student")
    answers = Answer(guess, features), Answer(guess, pooled("teacher"))
    found = numbers("relational", *answers, [features], distance=distance, angle=angle)
    assert found == pytest.approx(GOLDEN["relational"][case], rel=1e-10)


@pytest.mark.parametrize("case", DIST)
def test_dist(case):
    inter, intra = DIST[case]
    guess = logits("student").requires_grad_()
    found = numbers("dist", Answer(guess), Answer(logits("teacher")), [guess], inter=inter, intra=intra)
    # What keeps constant rows finite enters in another place.
    assert found == pytest.approx(GOLDEN["dist"][case], rel=1e-6)


def test_attention():
    maps, guess = [each.requires_grad_() for each in stages("student")], logits("student")
    answers = Answer(guess, None, tuple(maps)), Answer(guess, None, tuple(stages("teacher")))
    found = numbers("attention", *answers, maps, last=3)
    assert found == pytest.approx(GOLDEN["attention"]["three stages"], rel=1e-10)
