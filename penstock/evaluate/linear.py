"""Linear classification of frozen features, with every label and with a few per class."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from penstock import distributed
from penstock.errors import InputError
from penstock.evaluate._features import FeatureSet, check_labels, keyed_order
from penstock.recipe import Block
from penstock.schedule import Duration

MOMENTUM = 0.9
LEAST_STEPS = 1000  # small sets take more epochs, so that every rate has the time to converge
FEW_LABEL_STEPS = 300
LEAST_VARIANCE = 1e-4  # of the largest; a floor under what whitening divides by


@dataclass(frozen=True)
class Coordinates:
    """A change of the features' coordinates: ((x - mean) * scale) @ axes, [n, D] to [n, D]."""

    mean: Tensor  # [D]
    scale: Tensor  # [D]
    axes: Tensor | None = None  # [D, D]

    def __call__(self, rows: Tensor) -> Tensor:
        rows = (rows - self.mean) * self.scale
        return rows if self.axes is None else rows @ self.axes


@dataclass(frozen=True)
class Fitted:
    """A linear probe that was fitted: the learning rate and the coordinates that did best, and the classifier."""

    coordinates: Coordinates
    weight: Tensor  # [D, C], in those coordinates
    bias: Tensor  # [C]
    rate: float
    whitened: bool

    def __call__(self, features: Tensor) -> Tensor:
        """Logits [n, C] of features [n, D] on the CPU."""
        return self.coordinates(features).to(self.weight.device) @ self.weight + self.bias


class LinearProbe:
    """Softmax regression by SGD with a cosine schedule; figures are of the last epoch.

    All learning rates are trained together on nine tenths of the training set, on standardised features and on
    whitened ones: whitening is a linear change of coordinates, so it only helps SGD along, most of all on features that
    share few directions. The setting that does best on the other tenth is trained again on the whole training set, and
    only that head sees the validation set.

    Gives, in per cent, `linear_top1` and from ten classes on `linear_top5`, and the chosen `linear_lr` and
    `linear_whitened` (0 or 1). `linear_top1_K_per_class` is the mean over draws of K labels per class, `..._std` their
    standard deviation, on standardised features. The main rank computes, so all ranks agree.
    """

    class Config(Block):
        name: Literal["linear"] = "linear"
        learning_rates: tuple[PositiveFloat, ...] = Field(
            (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), min_length=1, description="tried together"
        )
        epochs: int = Field(30, ge=1, description="over the training set; small sets take more")
        batch: int = Field(256, ge=1, description="features per step")
        labels_per_class: tuple[PositiveInt, ...] = Field(
            (1,), description="few-label figures, one for each number; () is none"
        )
        draws: int = Field(10, ge=1, description="draws of labels that a few-label figure averages")
        seed: int = Field(0, description="of the split, the order and the draws")
        every: Duration | None = Field(None, description="how often during a run; null is at its end only")

    def __init__(self, config: Config):
        self.config = config

    def __call__(self, train: FeatureSet, val: FeatureSet) -> dict[str, float]:
        classes = check_labels(train, val)
        if len(train) < 2:
            raise InputError("a linear probe needs at least 2 labelled training images")
        for shots in self.config.labels_per_class:
            _check_enough(train, shots)
        return distributed.broadcast(self._measure(train, val, classes) if distributed.is_main() else None)

    def fit(self, train: FeatureSet, classes: int) -> Fitted:
        """The setting that does best on a tenth of the training set, trained on the whole of it."""
        device = distributed.device()
        labels = train.labels.to(device)
        order = keyed_order(train, self.config.seed).to(device)
        held, rest = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]

        candidates = []
        for whitened, coordinates in enumerate((_standardiser(train.features), _whitener(train.features))):
            x = coordinates(train.features).to(device)
            logits = self._fit(x[rest], labels[rest], classes, self.config.learning_rates)(x[held])
            for rate, guess in zip(self.config.learning_rates, logits, strict=True):
                loss = F.cross_entropy(guess, labels[held]).nan_to_num(math.inf).item()
                candidates.append((-_top(guess, labels[held], 1), loss, whitened, rate, coordinates))
        *_, whitened, rate, coordinates = min(candidates, key=lambda candidate: candidate[:4])

        weight = self._fit(coordinates(train.features).to(device), labels, classes, (rate,)).weight[0]
        return Fitted(coordinates, weight[:-1], weight[-1], rate, bool(whitened))

    def _measure(self, train: FeatureSet, val: FeatureSet, classes: int) -> dict[str, float]:
        device = distributed.device()
        labels, truth = train.labels.to(device), val.labels.to(device)
        probe = self.fit(train, classes)
        logits = probe(val.features)
        found = {
            "linear_top1": _top(logits, truth, 1),
            "linear_lr": probe.rate,
            "linear_whitened": float(probe.whitened),
        }
        if classes >= 10:
            found["linear_top5"] = _top(logits, truth, 5)
        coordinates = _standardiser(train.features)
        x, x_val = (coordinates(part.features).to(device) for part in (train, val))
        for shots in self.config.labels_per_class:
            found |= self._few_labels(train, x, labels, x_val, truth, classes, shots)
        return found

    def _fit(self, x: Tensor, labels: Tensor, classes: int, rates: tuple[float, ...]) -> "_Heads":
        batch = min(self.config.batch, len(x))
        per_epoch = len(x) // batch
        steps = max(self.config.epochs * per_epoch, LEAST_STEPS)
        heads = _Heads(torch.tensor(rates, device=x.device), x.shape[1], classes)
        generator = torch.Generator().manual_seed(self.config.seed)
        for step in range(steps):
            if step % per_epoch == 0:
                order = torch.randperm(len(x), generator=generator).to(x.device)
            rows = order[step % per_epoch * batch :][:batch]
            heads.step(x[rows], labels[rows], done=step / steps)
        return heads

    def _few_labels(
        self, train: FeatureSet, x: Tensor, labels: Tensor, x_val: Tensor, truth: Tensor, classes: int, shots: int
    ) -> dict[str, float]:
        draws = torch.stack([draw_labels(train, shots, self.config.seed, n) for n in range(self.config.draws)])
        draws = draws.to(x.device)
        # The Hessian's largest eigenvalue is at most D / 2 on standardised features: stable on any of them.
        rates = torch.full((len(draws),), 4 / x.shape[1], device=x.device)
        heads = _Heads(rates, x.shape[1], classes)
        for step in range(FEW_LABEL_STEPS):
            heads.step(x[draws], labels[draws], done=step / FEW_LABEL_STEPS)
        scores = torch.tensor([_top(heads(x_val, draw), truth, 1) for draw in range(len(draws))], dtype=torch.float64)
        name = f"linear_top1_{shots}_per_class"
        return {name: scores.mean().item(), f"{name}_std": scores.std(correction=0).item()}


class _Heads:
    """Several softmax regressions trained side by side, each with its own learning rate; they start at zero."""

    def __init__(self, rates: Tensor, dim: int, classes: int):
        self.rates = rates[:, None, None]
        self.weight = torch.zeros(len(rates), dim + 1, classes, device=rates.device)  # the last row is the bias
        self.velocity = torch.zeros_like(self.weight)

    def __call__(self, x: Tensor, head: int | None = None) -> Tensor:
        """Logits [H, n, C] of x [n, D] or [H, n, D]; [n, C] of one head."""
        weight = self.weight if head is None else self.weight[head]
        if weight.ndim == 2:
            return x @ weight[:-1] + weight[-1]
        rows = "nd" if x.ndim == 2 else "hnd"  # a shared x makes one large matrix product of all heads
        return torch.einsum(f"{rows},hdc->hnc", x, weight[:, :-1]) + weight[:, -1:]

    def step(self, x: Tensor, labels: Tensor, done: float) -> None:
        """One step on x [n, D] and labels [n], or each head's own [H, n, D] and [H, n]; `done` in [0, 1)."""
        probabilities = self(x).softmax(-1)
        target = F.one_hot(labels, self.weight.shape[-1]).to(probabilities.dtype)
        error = (probabilities - target) / labels.shape[-1]
        self.velocity *= MOMENTUM
        self.velocity[:, :-1] += torch.einsum("nd,hnc->hdc" if x.ndim == 2 else "hnd,hnc->hdc", x, error)
        self.velocity[:, -1:] += error.sum(-2, keepdim=True)
        self.weight -= self.rates * (0.5 * (1 + math.cos(math.pi * done))) * self.velocity


def draw_labels(train: FeatureSet, shots: int, seed: int, draw: int) -> Tensor:
    """Rows of `shots` samples of each class, a function of (seed, draw) and the samples' positions."""
    order = keyed_order(train, seed, draw + 1)
    order = order[train.labels[order].argsort(stable=True)]  # by class, in drawn order within each
    counts = train.labels.bincount()
    first = counts.cumsum(0) - counts
    return torch.cat([order[start : start + shots] for start, count in zip(first, counts, strict=True) if count])


def _check_enough(train: FeatureSet, shots: int) -> None:
    counts = train.labels.bincount()
    short = [(index, count) for index, count in enumerate(counts.tolist()) if 0 < count < shots]
    if short:
        label, count = short[0]
        raise InputError(
            f"labels_per_class: {shots} asks for more than the {count} training image(s) of class {label} "
            f"(and of {len(short) - 1} other classes); take at most {min(count for _, count in short)}"
        )


def _standardiser(features: Tensor) -> Coordinates:
    """To mean 0 and variance 1; dimensions that do not vary become 0."""
    std, mean = torch.std_mean(features.double(), dim=0, correction=0)
    scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0).to(features.dtype)
    return Coordinates(mean.to(features.dtype), scale)


def _whitener(features: Tensor) -> Coordinates:
    """Standardised, then to the principal axes with variance 1; axes of hardly any variance are amplified less."""
    standardised = _standardiser(features)
    x = standardised(features).double()
    variances, axes = torch.linalg.eigh(x.T @ x / len(x))
    floor = (LEAST_VARIANCE * variances.max()).clamp(min=torch.finfo(x.dtype).tiny)
    axes = (axes / (variances.clamp(min=0) + floor).sqrt()).to(features.dtype)
    return Coordinates(standardised.mean, standardised.scale, axes)


def _top(logits: Tensor, truth: Tensor, k: int) -> float:
    """Per cent of rows whose class is among the k largest logits; of equal logits the lower class comes first."""
    own = logits.gather(1, truth[:, None])
    lower = torch.arange(logits.shape[1], device=logits.device) < truth[:, None]
    ahead = (logits > own) | ((logits == own) & lower)
    return 100 * ((ahead.sum(1) < k) & own[:, 0].isfinite()).double().mean().item()
