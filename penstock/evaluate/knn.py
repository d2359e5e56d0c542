"""k nearest neighbours by cosine similarity, with a weighted vote (Wu et al. 2018; Caron et al. 2021)."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from penstock import distributed
from penstock.evaluate._features import FeatureSet, check_labels, keyed_order
from penstock.recipe import Block
from penstock.schedule import Duration

# Fixed blocks, dealt to the ranks in turn: the arithmetic, and so the result, does not depend on their number.
QUERIES, BANK = 256, 16384


class KNN:
    """Gives `knn_top1`, the per cent of validation images whose neighbours in the training set vote for their class.

    Exact, the same for any number of ranks; of equally similar neighbours those first in the training set count.
    """

    class Config(Block):
        name: Literal["knn"] = "knn"
        k: int = Field(20, ge=1, description="neighbours that vote; all of them when the bank is smaller")
        temperature: float = Field(0.07, gt=0, description="a neighbour's vote weighs exp(similarity / temperature)")
        bank: int | None = Field(None, ge=1, description="at most this many training images, a fixed draw; null is all")
        every: Duration | None = Field(None, description="how often during a run; null is at its end only")

    def __init__(self, config: Config):
        self.config = config

    def __call__(self, train: FeatureSet, val: FeatureSet) -> dict[str, float]:
        classes = check_labels(train, val)
        if self.config.bank is not None and len(train) > self.config.bank:
            train = train.rows(keyed_order(train, seed=0)[: self.config.bank].sort().values)
        device = distributed.device()
        bank, labels = F.normalize(train.features.to(device), dim=1), train.labels.to(device)
        queries, truth = F.normalize(val.features, dim=1), val.labels
        correct = torch.zeros((), dtype=torch.float64, device=device)
        rank, world = (distributed.rank(), distributed.world()) if distributed.started() else (0, 1)
        for start in range(rank * QUERIES, len(val), world * QUERIES):
            block = slice(start, start + QUERIES)
            guesses = self._classify(queries[block].to(device), bank, labels, classes)
            correct += (guesses == truth[block].to(device)).sum()
        return {"knn_top1": 100 * distributed.all_sum(correct).item() / len(val)}

    def _classify(self, queries: Tensor, bank: Tensor, labels: Tensor, classes: int) -> Tensor:
        similarity, index = neighbours(queries, bank, self.config.k)
        votes = (similarity.double() / self.config.temperature).exp()  # fp64: votes span exp(2 / 0.07)
        ballots = F.one_hot(labels[index], classes).to(votes.dtype)
        return torch.einsum("qk,qkc->qc", votes, ballots).argmax(1)


def neighbours(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarity and row in the bank of the k most similar rows, both [Q, min(k, len(bank))], best first.

    Among equals the lower row comes first.
    """
    best, rows = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long, device=bank.device)
    for start in range(0, len(bank), BANK):
        values, index = _top(queries @ bank[start : start + BANK].T, k)
        best, rows = torch.cat([best, values], 1), torch.cat([rows, index + start], 1)
        # Rows seen earlier are lower and stand further left, so a stable sort keeps the order among equals.
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, rows = best[:, :k], rows.gather(1, order)[:, :k]
    return best, rows


def _top(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    k = min(k, similarity.shape[1])
    values, index = similarity.topk(k, dim=1)
    tied = (similarity >= values[:, -1:]).sum(1) > k  # topk chose among equals as it liked
    if tied.any():
        values[tied], index[tied] = (part[:, :k] for part in similarity[tied].sort(dim=1, descending=True, stable=True))
    index, order = index.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, order)
