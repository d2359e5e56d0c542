"""Distillation losses beside slow transcriptions of their papers, in value and gradient.

Loops over samples, classes, places, pairs and triplets, one sample at a time.
"""

import math

import pytest
import torch

from tests.distillation import CASES, ROWS, gradients, labels, leaf, setting, step


def softmax(row, temperature):
    exps = [torch.exp(value / temperature) for value in row]
    return [value / sum(exps) for value in exps]


def kl(p, q):
    return sum(a * torch.log(a / b) for a, b in zip(p, q, strict=True))


def pearson_distance(a, b):
    x, y = ([value - sum(row) / len(row) for value in row] for row in (a, b))
    product = sum(u * v for u, v in zip(x, y, strict=True))
    return 1 - product / torch.sqrt(sum(u * u for u in x)) / torch.sqrt(sum(v * v for v in y))


def huber(a, b):
    difference = abs(a - b)
    return 0.5 * difference**2 if difference <= 1 else difference - 0.5


def normal(row):
    centred = row - row.mean()
    return centred / torch.sqrt((centred * centred).mean() + 1e-5)


def slow_soft_targets(config, student, teacher, targets, loss):
    t, total = config.temperature, 0
    for s, z in zip(student.logits, teacher.logits, strict=True):
        if config.standardize:
            s, z = normal(s), normal(z)
        total = total + t * t * kl(softmax(z, t), softmax(s, t))
    return total / len(targets)


def slow_hard_labels(config, student, teacher, targets, loss):
    picked = [z.tolist().index(max(z.tolist())) for z in teacher.logits]
    return sum(-torch.log(softmax(s, 1)[k]) for s, k in zip(student.logits, picked, strict=True)) / len(picked)


def slow_binary_targets(config, student, teacher, targets, loss):
    t, total = config.temperature, 0
    for s, z in zip(student.logits.flatten(), teacher.logits.flatten(), strict=True):
        p, q = 1 / (1 + torch.exp(-z / t)), 1 / (1 + torch.exp(-s / t))
        total = total + t * t * kl([p, 1 - p], [q, 1 - q])
    return total / len(targets)


def slow_decoupled(config, student, teacher, targets, loss):
    t, total = config.temperature, 0
    for s, z, target in zip(student.logits, teacher.logits, targets, strict=True):
        k = int(target.argmax())
        q, p = softmax(s, t), softmax(z, t)
        tckd = kl([p[k], 1 - p[k]], [q[k], 1 - q[k]])
        others = [c for c in range(len(p)) if c != k]
        nckd = kl([p[c] / (1 - p[k]) for c in others], [q[c] / (1 - q[k]) for c in others])
        total = total + t * t * (config.alpha * tckd + config.beta * nckd)
    return total / len(targets)


def slow_dist(config, student, teacher, targets, loss):
    t = config.temperature
    own, its = ([softmax(row, t) for row in each.logits] for each in (student, teacher))
    inter = [pearson_distance(a, b) for a, b in zip(own, its, strict=True)]
    columns = zip(zip(*own, strict=True), zip(*its, strict=True), strict=True)
    intra = [pearson_distance(list(a), list(b)) for a, b in columns]
    return t * t * (config.inter * sum(inter) / len(inter) + config.intra * sum(intra) / len(intra))


def slow_relational(config, student, teacher, targets, loss):
    own, its = (getattr(each, config.on) for each in (student, teacher))
    rows = range(len(own))

    def distances(x):
        found = {(i, j): torch.sqrt(((x[i] - x[j]) ** 2).sum()) for i in rows for j in rows if i != j}
        return {pair: value / (sum(found.values()) / len(found)) for pair, value in found.items()}

    def angle(x, i, j, k):
        a, b = x[i] - x[j], x[k] - x[j]
        return (a @ b) / torch.sqrt(a @ a) / torch.sqrt(b @ b)

    ours, theirs = distances(own), distances(its)
    apart = sum(huber(ours[pair], theirs[pair]) for pair in ours) / len(rows) ** 2
    triplets = [(i, j, k) for i in rows for j in rows for k in rows if i != j and j != k]
    bent = sum(huber(angle(own, *each), angle(its, *each)) for each in triplets) / len(rows) ** 3
    return config.distance * apart + config.angle * bent


def cell_mean(x, height, width):
    """A map [C, H, W] averaged to [C, height, width], cell by cell."""
    _, h, w = x.shape
    rows = [(math.floor(i * h / height), math.ceil((i + 1) * h / height)) for i in range(height)]
    columns = [(math.floor(j * w / width), math.ceil((j + 1) * w / width)) for j in range(width)]
    return torch.stack([torch.stack([x[:, a:b, c:d].mean((1, 2)) for c, d in columns], 1) for a, b in rows], 1)


def smaller(a, b):
    size = min(a.shape[1], b.shape[1]), min(a.shape[2], b.shape[2])
    return cell_mean(a, *size), cell_mean(b, *size)


def slow_attention(config, student, teacher, targets, loss):
    total = 0
    for depth in range(1, config.last + 1):
        for own, its in zip(student.stages[-depth], teacher.stages[-depth], strict=True):
            looks = smaller(*((maps**2).mean(0, keepdim=True) for maps in (own, its)))
            a, b = (look.flatten() / torch.sqrt((look**2).sum()) for look in looks)
            total = total + sum((a - b) ** 2) / len(a)
    return total / len(targets)


def slow_features(config, student, teacher, targets, loss):
    compare = {
        "mse": lambda a, b: sum((a - b) ** 2) / len(a),
        "smooth_l1": lambda a, b: sum(huber(x, y) for x, y in zip(a, b, strict=True)) / len(a),
        "cosine": lambda a, b: 1 - (a @ b) / torch.sqrt(a @ a) / torch.sqrt(b @ b),
    }[config.loss]
    if config.on == "pooled":
        pairs = [(student.pooled[..., None, None], teacher.pooled[..., None, None])]
    else:
        pairs = list(zip(student.stages[-config.last :], teacher.stages[-config.last :], strict=True))
    total = 0
    for project, (own, its) in zip(loss.module.projectors, pairs, strict=True):
        for a, b in zip(own, its, strict=True):
            x, y = (each.flatten(1).T for each in smaller(a, b))  # places, channels
            total = total + sum(compare(project(u), normal(v)) for u, v in zip(x, y, strict=True)) / len(x)
    return total / len(pairs) / len(targets)


@pytest.mark.parametrize("case", CASES)
def test_it_equals_a_slow_transcription_in_value_and_gradient(case):
    loss, student, teacher = setting(case)
    value, found = step(loss, student, teacher)
    given = leaf(student)
    loss.module.zero_grad()
    slow = globals()[f"slow_{CASES[case][0]}"](loss.module.config, given, teacher, labels(ROWS, 5), loss)
    slow.backward()
    wanted = gradients(given) + [p.grad for p in loss.module.parameters()]
    # What keeps DIST's constant rows finite weighs 1e-8.
    rtol, atol = (1e-5, 1e-6) if "dist" in case else (1e-9, 1e-11)
    torch.testing.assert_close([value, *found], [slow.detach(), *wanted], rtol=rtol, atol=atol)
