"""What must hold of every distillation loss, and of some."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from finetune.distillation import DISTILLATIONS, Answer, Widths, relational
from finetune.distillation.dist import _across_classes
from penstock.errors import InputError
from penstock.schedule import Constant, knobs_of
from tests.distillation import (
    CASES,
    ROWS,
    STUDENT,
    TEACHER,
    answer,
    flat,
    labels,
    leaf,
    make,
    rows_of,
    setting,
    step,
    unflat,
)

# Every loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_differences(case):
    loss, student, teacher = setting(case, rows=4)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])

    def mean(*tensors):
        return loss.mean(unflat(tensors), teacher, None, weights)

    assert torch.autograd.gradcheck(mean, flat(leaf(student)), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_samples_of_weight_0_are_as_if_they_were_not_there(case):
    loss, student, teacher = setting(case)
    weights, keep = torch.tensor([1.0, 0, 1, 1, 0, 1]), torch.tensor([0, 2, 3, 5])
    targets = labels(ROWS, 5)
    value, found = step(loss, student, teacher, targets, weights)
    other, others = answer(ROWS, STUDENT, 77), answer(ROWS, TEACHER, 78)
    garbage = float("nan") if loss.module.looks_across_samples else 100.0
    real = [(weights > 0).view(-1, *[1] * (each.ndim - 1)) for each in flat(student)]
    mixed = [
        unflat([torch.where(kept, a, garbage * b) for kept, a, b in zip(real, flat(x), flat(y), strict=True)])
        for x, y in ((student, other), (teacher, others))
    ]
    changed, moved = step(loss, *mixed, targets, weights)
    alone, without = step(loss, rows_of(student, keep), rows_of(teacher, keep), targets[keep])
    torch.testing.assert_close(value, changed, rtol=1e-12, atol=0)
    torch.testing.assert_close(value, alone, rtol=1e-10, atol=0)
    for index, (a, b, c) in enumerate(zip(found, moved, without, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
        whole = index >= len(flat(student))
        torch.testing.assert_close(a if whole else a[keep], c, rtol=1e-9, atol=1e-13)
        assert whole or not a[weights == 0].any()


@pytest.mark.parametrize("valid", [[], [2]], ids=["no valid sample", "one"])
@pytest.mark.parametrize("case", CASES)
def test_few_valid_samples_give_finite_values_and_gradients(case, valid):
    loss, student, teacher = setting(case)
    weights = torch.zeros(ROWS)
    weights[valid] = 1
    value, found = step(loss, student, teacher, None, weights)
    assert value.isfinite() and all(grad.isfinite().all() for grad in found)
    if not valid:
        assert value == 0 and not any(grad.any() for grad in found)


def same_samples(given: Answer) -> Answer:
    return unflat([each[:1].expand_as(each) for each in flat(given)])


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
@pytest.mark.parametrize("what", ["equal samples", "zeros"])
@pytest.mark.parametrize("case", CASES)
def test_collapsed_answers_give_finite_values_and_gradients(case, what, who):
    loss, student, teacher = setting(case)
    change = same_samples if what == "equal samples" else lambda given: unflat([0 * each for each in flat(given)])
    student = change(student) if who != "teacher" else student
    teacher = change(teacher) if who != "student" else teacher
    loss.module.float()
    student, teacher = (unflat([each.float() for each in flat(given)]) for given in (student, teacher))
    value, found = step(loss, student, teacher)
    assert value.isfinite() and all(grad.isfinite().all() for grad in found)
    assert max(grad.abs().max() for grad in found) < 1e4 * loss.knobs["weight"]


@pytest.mark.parametrize("case", [case for case, (name, _) in CASES.items() if name not in ("hard_labels", "features")])
def test_equal_answers_cost_nothing_and_pull_nowhere(case):
    """But for hard labels, where an answer that is not sure costs something, and projectors, which begin at random."""
    name, options = CASES[case]
    loss, given = make(name, STUDENT, STUDENT, **options), answer(ROWS, STUDENT, 1)
    value, found = step(loss, given, given)
    assert abs(value) < 1e-12 and all(grad.abs().max() < 1e-10 for grad in found)


@pytest.mark.parametrize("case", CASES)
def test_sure_answers_give_finite_values_and_gradients_in_fp32(case):
    name, options = CASES[case]
    widths = Widths(3, 4, (3, 2, 3))
    loss = make(name, widths, widths, **options)
    loss.module.float()
    student, teacher = (unflat([each.float() for each in flat(answer(4, widths, seed))]) for seed in (1, 2))
    own = torch.tensor([[120.0, 0, 0], [0, 1e4, 0], [-300, 300, 0], [5, 5, 5]])
    its = torch.tensor([[200.0, 0, 0], [1e4, 0, 0], [300, -300, 0], [0, 0, 900]])
    for a, b in ((own, its), (its, own), (own, own.roll(1, 0))):
        value, found = step(loss, student._replace(logits=a), teacher._replace(logits=b))
        assert value.isfinite() and all(grad.isfinite().all() for grad in found)


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_samples_does_not_matter(case):
    loss, student, teacher = setting(case)
    order, targets = torch.tensor([3, 0, 5, 1, 4, 2]), labels(ROWS, 5)
    shuffled = loss(rows_of(student, order), rows_of(teacher, order), targets[order])
    torch.testing.assert_close(shuffled, loss(student, teacher, targets)[order], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("relational")])
def test_a_batch_twice_costs_the_same(case):
    """Relations differ: there are pairs of a sample and its copy."""
    loss, student, teacher = setting(case)
    twice, targets = torch.arange(ROWS).repeat(2), labels(ROWS, 5)
    value = loss.mean(rows_of(student, twice), rows_of(teacher, twice), targets[twice])
    torch.testing.assert_close(value, loss.mean(student, teacher, targets), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["soft_targets", "decoupled", "binary_targets", "hard_labels"])
def test_classes_that_are_never_answered_cost_nothing(name):
    loss, student, teacher = make(name), answer(ROWS, STUDENT, 1), answer(ROWS, TEACHER, 2)
    never = torch.full((ROWS, 995), -1e4, dtype=torch.float64)
    own, its = [given._replace(logits=torch.cat([given.logits, never], 1)) for given in (student, teacher)]
    targets = torch.cat([labels(ROWS, 5), torch.zeros(ROWS, 995)], 1)
    torch.testing.assert_close(loss(own, its, targets), loss(student, teacher), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["soft_targets", "decoupled", "binary_targets"])
def test_the_gradient_is_as_large_at_every_temperature(name):
    norms = []
    for temperature in (1.0, 4.0, 20.0):
        student, teacher = (given._replace(logits=0.1 * given.logits) for given in setting(name)[1:])
        norms.append(step(make(name, temperature=temperature), student, teacher)[1][0].norm())
    assert max(norms) < 2 * min(norms), norms


@pytest.mark.parametrize("name", DISTILLATIONS.names())
def test_what_cannot_work_is_refused(name):
    config = DISTILLATIONS.get(name).Config()
    for key in knobs_of(config):
        with pytest.raises(ValueError, match="above 0" if key == "temperature" else "not negative"):
            type(config)(**{key: -0.5})
        with pytest.raises(ValueError, match="above 0" if key == "temperature" else "not negative"):
            type(config)(**{key: Constant(start=-0.5)})
    assert "weight" in knobs_of(config) and config.name == name


@pytest.mark.parametrize("case", CASES)
def test_it_says_what_it_needs_and_needs_no_more(case):
    loss, student, teacher = setting(case)
    kept = loss.module.stages
    own, its = [
        Answer(each.logits, each.pooled if loss.module.features else None, each.stages[len(each.stages) - kept :])
        for each in (student, teacher)
    ]
    torch.testing.assert_close(loss(own, its), loss(student, teacher), rtol=0, atol=0)
    alone = loss(rows_of(student, torch.tensor([1])), rows_of(teacher, torch.tensor([1])), labels(ROWS, 5)[[1]])
    independent = torch.allclose(alone, loss(student, teacher)[1], rtol=1e-9, atol=1e-12)
    assert independent != loss.module.looks_across_samples


# Some of them ---------------------------------------------------------------------------------------------------------


def test_soft_targets_are_the_two_parts_of_the_decoupled_loss():
    """KD = TCKD + (1 - p) NCKD, p the teacher's probability of the target (equation 7)."""
    student, teacher, targets = answer(ROWS, STUDENT, 1), answer(ROWS, TEACHER, 2), labels(ROWS, 5)
    whole = make("soft_targets", temperature=4.0)(student, teacher, targets)
    tckd = make("decoupled", alpha=1, beta=0)(student, teacher, targets)
    nckd = make("decoupled", alpha=0, beta=1)(student, teacher, targets)
    sure = ((teacher.logits / 4).softmax(1) * F.one_hot(targets.argmax(1), 5)).sum(1)
    torch.testing.assert_close(whole, tckd + (1 - sure) * nckd, rtol=1e-6, atol=1e-9)


def test_relations_of_classes_see_neither_scale_nor_shift():
    student, teacher = answer(ROWS, STUDENT, 1), answer(ROWS, TEACHER, 2)
    own, its = student.logits.softmax(1), teacher.logits.softmax(1)
    scale = torch.rand(ROWS, 1, dtype=torch.float64) + 0.5
    plain, moved = (_across_classes(torch.stack([each, its])) for each in (own, scale * own + scale - 0.3))
    torch.testing.assert_close(plain, moved, rtol=1e-6, atol=1e-6)
    loss, shift = make("dist"), torch.arange(ROWS)[:, None]
    shifted = student._replace(logits=student.logits + 3 * shift)
    torch.testing.assert_close(loss(shifted, teacher), loss(student, teacher), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("part,scale", [("distance", 7.0), ("angle", 7.0), ("both", 1.0)])
def test_relations_see_neither_rotation_nor_place_nor_scale(part, scale):
    off = {"distance": "angle", "angle": "distance"}
    options: dict[str, Any] = {off[part]: 0} if part in off else {}
    loss, student, teacher = make("relational", **options), answer(ROWS, STUDENT, 1), answer(ROWS, TEACHER, 2)
    turn = torch.linalg.qr(answer(4, STUDENT, 3).pooled).Q
    moved = student._replace(pooled=scale * student.pooled @ turn + 5)
    torch.testing.assert_close(loss.mean(moved, teacher), loss.mean(student, teacher), rtol=1e-9, atol=0)


def test_relations_are_the_same_in_small_parts(monkeypatch):
    loss, student, teacher = setting("relational")
    value, found = step(loss, student, teacher)
    monkeypatch.setattr(relational, "NUMBERS", 2 * ROWS * ROWS)
    assert len(relational._parts(ROWS, ROWS, ROWS)) == 3
    again, parts = step(loss, student, teacher)
    torch.testing.assert_close([again, *parts], [value, *found], rtol=1e-12, atol=1e-15)


def test_copies_of_a_sample_pull_nowhere_wild():
    """The gradient of a distance or of a direction has no value at 0: there it is none."""
    loss, student, teacher = setting("relational")
    features = flat(student)[1].clone()
    features[1] = features[0]
    gradient = step(loss, student._replace(pooled=features), teacher)[1][1]
    assert gradient.isfinite().all() and 0 < gradient.abs().max() < 100


def test_attention_sees_no_scale_and_pools_the_larger_map():
    loss, student, teacher = setting("attention")
    bigger = student._replace(stages=tuple(3 * each for each in student.stages))
    torch.testing.assert_close(loss(bigger, teacher), loss(student, teacher), rtol=1e-9, atol=1e-15)
    fine = student._replace(
        stages=tuple(each.repeat_interleave(2, 2).repeat_interleave(2, 3) for each in student.stages)
    )
    even = make("attention", STUDENT, STUDENT)
    assert even.mean(fine, student) < 1e-20


def test_a_projector_learns_what_can_be_learned():
    """Teacher features that are a linear map of the student's, but for their normalisation."""
    torch.manual_seed(0)
    loss, student = make("features"), answer(64, STUDENT, 1)
    assert student.pooled is not None
    wanted = F.layer_norm(student.pooled @ torch.randn(4, 6, dtype=torch.float64), (6,))
    teacher = answer(64, TEACHER, 2)._replace(pooled=wanted)
    optimizer = torch.optim.Adam(loss.module.parameters(), lr=0.05)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        values.append(loss.mean(student, teacher))
        values[-1].backward()
        optimizer.step()
    assert values[-1] < 0.35 * values[0]


@pytest.mark.parametrize("name,options", [("attention", {"last": 4}), ("features", {"on": "stages", "last": 4})])
def test_more_stages_than_there_are_is_refused(name, options):
    with pytest.raises(InputError, match=f"task.losses.{name}.last.*the student shows 3; set it to 3 or less"):
        make(name, **options)


def test_decoupling_one_class_is_refused():
    with pytest.raises(InputError, match="one class"):
        make("decoupled", Widths(1, 4), Widths(1, 4))
