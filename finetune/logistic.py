"""Softmax regression of frozen features with a quadratic penalty: what a probed head starts from."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock import distributed
from penstock.evaluate._features import FeatureSet, keyed_order

PENALTIES = tuple(10.0**power for power in range(1, -7, -1))  # from the strongest
POINTS = 1.0  # of held-out accuracy that a stronger penalty may cost
ITERATIONS = 200  # of L-BFGS at each penalty
ROWS = 65_536  # features at a time


@dataclass(frozen=True)
class Logistic:
    """A classifier of the features themselves, and the penalty it was fitted with."""

    weight: Tensor  # fp32 [C, D], on the CPU
    bias: Tensor  # fp32 [C]
    penalty: float

    def __call__(self, features: Tensor) -> Tensor:
        """Logits [n, C] of features [n, D] on the CPU."""
        return features @ self.weight.T + self.bias


def fit(train: FeatureSet, classes: int, seed: int = 0) -> Logistic:
    """The strongest penalty within a point of the best accuracy on a held-out tenth, fitted again on the whole set.

    Features are centred, and divided by one number for all dimensions. To standardise or to whiten them would give
    weights of any size to dimensions that hardly vary, and the first steps of finetuning, which move such a dimension
    by more than it varied, would undo the classifier. Kumar et al. (2022) start from a probe with a penalty, too.

    Args:
        train: at least two samples.
    """
    device = distributed.device()
    variances, mean = torch.var_mean(train.features.double(), dim=0, correction=0)
    deviation = variances.mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    x, labels = ((train.features - mean) / deviation).float().to(device), train.labels.to(device)
    order = keyed_order(train, seed).to(device)
    held, rest = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]

    start = torch.zeros(x.shape[1] + 1, classes, dtype=torch.float64, device=device)
    weights, found = start, []
    for penalty in PENALTIES:
        weights = minimum(x[rest], labels[rest], penalty, weights)  # from that of the last penalty
        guess = (x[held].double() @ weights[:-1] + weights[-1]).argmax(1)
        found.append(100 * (guess == labels[held]).double().mean().item())
    penalty = next(penalty for penalty, top in zip(PENALTIES, found, strict=True) if top >= max(found) - POINTS)

    weights = minimum(x, labels, penalty, start).cpu()
    weight = weights[:-1].T / deviation
    bias = weights[-1] - weight @ mean
    return Logistic(weight.float().contiguous(), bias.float(), penalty)


def minimum(x: Tensor, labels: Tensor, penalty: float, start: Tensor) -> Tensor:
    """The weights [D + 1, C], the bias in the last row, at which the mean cross-entropy and penalty / 2 times the sum
    of the squared weights, without the bias, are least; fp64. The problem is convex, so it has one answer.

    Args:
        x: features [n, D].
        labels: [n].
        start: where the search begins [D + 1, C].
    """
    weights = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [weights], max_iter=ITERATIONS, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def loss() -> float:
        search.zero_grad()
        value = 0.5 * penalty * weights[:-1].square().sum()
        value.backward()
        total = value.item()
        for rows, truth in zip(x.split(ROWS), labels.split(ROWS), strict=True):
            logits = rows.double() @ weights[:-1] + weights[-1]
            value = F.cross_entropy(logits, truth, reduction="sum") / len(x)
            value.backward()
            total += value.item()
        return total

    search.step(loss)
    return weights.detach()
