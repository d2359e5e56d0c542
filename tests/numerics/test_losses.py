"""Losses of classification and distillation, beside timm's, torch's and slow transcriptions of the formulas."""

import math

import pytest
import timm.loss
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target

from finetune.distillation import DISTILLATIONS, Answer, Widths
from finetune.distillation.soft_targets import SoftTargets
from finetune.losses import LOSSES
from finetune.losses.binary import Binary
from finetune.losses.cross_entropy import CrossEntropy
from penstock.errors import InputError
from penstock.mixing import Mixing
from penstock.recipe import Block, Source, check, one_of

B, K = 12, 7


def cross_entropy(**options) -> CrossEntropy:
    return CrossEntropy(CrossEntropy.Config(**options))


def binary(**options) -> Binary:
    return Binary(Binary.Config(**options))


def data(seed: int = 0, classes: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(B, classes, generator=generator), torch.randint(0, classes, (B,), generator=generator)


def mixed(targets: torch.Tensor, alpha: float = 0.8) -> torch.Tensor:
    """The targets after Mixup."""
    knobs = {"mixup": alpha, "cutmix": 0.0, "mix_prob": 1.0}
    mixing = Mixing(Mixing.Config(mode="sample"), 0)
    return mixing(torch.zeros(len(targets), 1, 2, 2), targets, torch.arange(len(targets)), torch.ones(B), knobs)[1]


@pytest.mark.parametrize("name", LOSSES.names())
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothed_targets(name, smoothing):
    kind = LOSSES.get(name)
    labels = torch.tensor([0, 3, K - 1])
    targets = kind(kind.Config(smoothing=smoothing)).targets(labels, K)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(3))
    for row, label in zip(targets.tolist(), labels.tolist(), strict=True):
        for place, value in enumerate(row):
            assert value == pytest.approx((1 - smoothing) * (place == label) + smoothing / K, abs=1e-7)
    torch.testing.assert_close(targets, mixup_target(labels, K, 1.0, smoothing), atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", LOSSES.names())
def test_a_slot_without_a_label_gives_a_finite_loss(name):
    kind = LOSSES.get(name)
    loss = kind(kind.Config(smoothing=0.1))
    assert loss(torch.zeros(2, K), loss.targets(torch.tensor([-1, 2]), K)).isfinite().all()


# Cross-entropy


def test_cross_entropy_equals_torchs_on_hard_labels():
    logits, labels = data()
    for smoothing in (0.0, 0.1, 0.3):
        loss = cross_entropy(smoothing=smoothing)
        wanted = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(loss(logits, loss.targets(labels, K)), wanted)
    theirs = timm.loss.LabelSmoothingCrossEntropy(0.1)(logits, labels)
    once = cross_entropy(smoothing=0.1)
    targets = once.targets(labels, K)
    torch.testing.assert_close(once(logits, targets).mean(), theirs)
    twice = F.cross_entropy(logits, targets, label_smoothing=0.1)
    assert abs(twice - theirs) > 0.05  # what smoothing in two places would give


def test_cross_entropy_equals_timms_on_mixed_targets():
    logits, labels = data()
    loss = cross_entropy(smoothing=0.1)
    targets = mixed(loss.targets(labels, K))
    assert ((targets > 0.1 / K + 1e-6).sum(1) == 2).any()
    torch.testing.assert_close(loss(logits, targets).mean(), timm.loss.SoftTargetCrossEntropy()(logits, targets))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [10, 1000])
def test_uniform_logits_cost_the_logarithm_of_the_classes(smoothing, classes):
    loss = cross_entropy(smoothing=smoothing)
    targets = loss.targets(torch.arange(5), classes)
    torch.testing.assert_close(loss(torch.full((5, classes), 2.5), targets), torch.full((5,), math.log(classes)))


# Binary cross-entropy


def test_binary_equals_a_slow_transcription():
    logits, labels = data()
    loss = binary(smoothing=0.1, threshold=0.2)
    targets = mixed(loss.targets(labels, K))
    losses = loss(logits, targets).tolist()
    hard = mixed(F.one_hot(labels, K).float())
    for i in range(B):
        total = 0.0
        for k in range(K):
            p = 1 / (1 + math.exp(-logits[i, k].item()))
            shown = 0.9 * (hard[i, k].item() > 0.2) + 0.1 / K
            total -= shown * math.log(p) + (1 - shown) * math.log(1 - p)
        assert losses[i] == pytest.approx(total / K, rel=1e-4)
    torch.testing.assert_close(
        binary(smoothing=0.1, threshold=0.2, reduction="sum")(logits, targets) / K, loss(logits, targets)
    )


def test_binary_equals_timms():
    logits, labels = data()
    loss = binary(smoothing=0.1)
    theirs = timm.loss.BinaryCrossEntropy(smoothing=0.1)(logits, labels)
    torch.testing.assert_close(loss(logits, loss.targets(labels, K)).mean(), theirs)
    targets = mixed(binary().targets(labels, K))
    for threshold in (None, 0.2):
        for summed in (False, True):
            theirs = timm.loss.BinaryCrossEntropy(0.0, target_threshold=threshold, sum_classes=summed)(logits, targets)
            ours = binary(threshold=threshold, reduction="sum" if summed else "mean")
            torch.testing.assert_close(ours(logits, targets).mean(), theirs)
    deit3 = F.binary_cross_entropy_with_logits(logits, targets.gt(0.0).type(targets.dtype))
    torch.testing.assert_close(binary(threshold=0.0)(logits, targets).mean(), deit3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.49])
@pytest.mark.parametrize("classes", [2, 7, 1000])
def test_at_most_the_two_classes_mixed_count_as_shown(smoothing, threshold, classes):
    labels = torch.arange(B) // (B // 2)  # partners differ
    loss = binary(smoothing=smoothing, threshold=threshold)
    targets = mixed(loss.targets(labels, classes))
    shown = loss.shown(targets)
    positives = (shown > smoothing / classes + 0.3).sum(1)
    assert (positives >= 1).all() and (positives <= 2).all()
    assert (positives == 2).any() or threshold == 0.49
    if smoothing:
        assert (targets.gt(0).sum(1) == classes).all()  # the trap: everything would count as shown
        hard = (shown - smoothing / classes) / (1 - smoothing)  # smoothed once, after all
        torch.testing.assert_close(hard, hard.round(), atol=1e-6, rtol=0)


def test_rounding_is_no_class_that_was_mixed_in():
    loss = binary(smoothing=0.1, threshold=0.0)
    targets = loss.targets(torch.arange(B), 1000)
    rounded = 0
    for share in torch.linspace(0.1, 0.9, 33).tolist():
        blended = targets * share + targets.flip(0) * (1 - share)  # unlike lerp, this rounds
        rounded += ((blended - 0.1 / 1000) / 0.9 > 0).sum() > 2 * B
        assert ((loss.shown(blended) > 0.5).sum(1) == 2).all()
    assert rounded


def test_a_class_mixed_with_itself_is_one_positive():
    loss = binary(smoothing=0.1, threshold=0.2)
    shown = loss.shown(mixed(loss.targets(torch.full((B,), 3), K)))
    torch.testing.assert_close(shown, loss.targets(torch.full((B,), 3), K))


# What all share


@pytest.mark.parametrize("loss", [cross_entropy(smoothing=0.1), binary(smoothing=0.1), binary(threshold=0.2)])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_extreme_logits_stay_finite(loss, size):
    logits = torch.zeros(3, K)
    logits[0, 2], logits[1, 2], logits[2, 5] = size, -size, size
    logits.requires_grad_()
    losses = loss(logits, loss.targets(torch.full((3,), 2), K))
    losses.sum().backward()
    assert losses.isfinite().all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", [cross_entropy(smoothing=0.1), binary(smoothing=0.1, threshold=0.2)])
def test_arithmetic_is_fp32_under_autocast_and_fp64_where_given(loss):
    logits, labels = data(classes=200)
    targets = mixed(loss.targets(labels, 200))
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(logits.bfloat16(), targets)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, loss(logits.bfloat16().float(), targets))
    assert loss(logits.double(), targets.double()).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: loss(x, targets[:2].double()), logits[:2].double().requires_grad_())


class Recipe(Block):
    loss: one_of("finetune.losses")  # type: ignore[valid-type]


@pytest.mark.parametrize(
    "block,words",
    [
        ({"name": "binary", "threshold": 0.5}, ["loss.threshold", "less than 0.5"]),
        ({"name": "cross_entropy", "smoothing": 1.0}, ["loss.smoothing", "less than 1"]),
        ({"name": "cross_entropi"}, ["loss.name", "did you mean 'cross_entropy'"]),
        ({"name": "cross_entropy", "label_smoothing": 0.1}, ["loss.label_smoothing", "did you mean 'smoothing'"]),
    ],
)
def test_what_cannot_work_is_refused(block, words):
    with pytest.raises(InputError) as caught:
        check(Recipe, Source({"loss": block}))
    assert all(word in str(caught.value) for word in words), caught.value


# Distillation


def distil(student, teacher, temperature=1.0):
    widths, rows = Widths(student.shape[1], 4), len(student)
    loss = SoftTargets(SoftTargets.Config(), widths, widths)
    targets = F.one_hot(torch.zeros(rows, dtype=torch.long), student.shape[1])
    return loss(Answer(student), Answer(teacher), targets, torch.ones(rows), {"temperature": temperature})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_targets_equal_a_slow_transcription(temperature):
    student, teacher = data(0)[0], data(1)[0]
    losses = distil(student, teacher, temperature).tolist()
    for i in range(B):
        exps = [[math.exp(v / temperature) for v in row[i].tolist()] for row in (student, teacher)]
        q, p = ([e / sum(row) for e in row] for row in exps)
        wanted = temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert losses[i] == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equal_answers_cost_nothing(temperature):
    student = data()[0].requires_grad_()
    loss = distil(student, student.detach() + 5, temperature)  # a shift of all logits is no other answer
    loss.sum().backward()
    assert loss.abs().max() < 1e-5 and student.grad.abs().max() < 1e-5


def test_the_gradient_is_as_large_at_every_temperature():
    norms = []
    for temperature in (1.0, 4.0, 20.0):
        student, teacher = 0.1 * data(0)[0], 0.1 * data(1)[0]
        student.requires_grad_()
        distil(student, teacher, temperature).mean().backward()
        norms.append(student.grad.norm())
    assert max(norms) < 2 * min(norms), norms


def test_the_loss_is_a_mean_over_samples_and_a_sum_over_classes():
    student, teacher = data(0)[0], data(1)[0]
    loss = distil(student, teacher, 2.0)
    assert loss.shape == (B,)
    torch.testing.assert_close(distil(student.repeat(2, 1), teacher.repeat(2, 1), 2.0).mean(), loss.mean())
    never = torch.full((B, 993), -1e4)  # classes that neither ever answers
    torch.testing.assert_close(distil(torch.cat([student, never], 1), torch.cat([teacher, never], 1), 2.0), loss)
    theirs = F.kl_div((student / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean") * 4
    torch.testing.assert_close(loss.mean(), theirs)


def test_distillation_stays_finite():
    student = torch.tensor([[120.0, 0, 0], [0, 1e4, 0]], requires_grad=True)
    teacher = torch.tensor([[200.0, 0, 0], [1e4, 0, 0]])
    loss = distil(student, teacher, 4.0)
    assert loss.isfinite().all()
    loss.sum().backward()
    assert student.grad.isfinite().all()


def test_distillations_are_components_with_positive_temperatures():
    assert DISTILLATIONS.get("soft_targets") is SoftTargets
    with pytest.raises(ValueError, match="above 0"):
        SoftTargets.Config(temperature=0.0)
