"""Paired comparisons of trained classifiers: how much of a difference is more than the luck of images and seeds.

Every run predicts the same validation images, so images are resampled jointly for all runs: an image that is hard for
one run is hard for the other, and that part of the noise cancels in their difference (a paired bootstrap; Efron and
Tibshirani 1993). Seeds are few: resampling three of them loses a third of their variance, and 95 % intervals were seen
to hold the truth in 80 % of cases. Their part of an interval comes from Student's t instead.

Calibration error is the one of Guo et al. 2017, which few images make look larger than it is; its interval is around
what is measured on as many images.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from penstock.errors import InputError

BINS = 15  # of confidence, equally wide, as in Guo et al. 2017
METRICS = ("top1", "ece", "nll")
PERCENT = {"top1": 100.0, "ece": 100.0, "nll": 1.0}  # top-1 and calibration error are given in per cent, nll in nats
CHUNK = 100  # resamples of the images held in memory at once
DRAWS = 50_000  # of the distribution that the limits are read from

Array = NDArray[Any]


@dataclass(frozen=True)
class Predictions:
    """What one run says of the validation images: positions [n], labels [n], logits [n, K]."""

    positions: Array
    labels: Array
    logits: Array

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Raises InputError where the file is absent, damaged, or holds something else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                found = cls(*(file[name] for name in ("positions", "labels", "logits")))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise InputError(f"{path}: no predictions can be read from it ({error}); run it again") from None
        n, classes = found.logits.shape if found.logits.ndim == 2 else (0, 0)
        if not n or found.positions.shape != (n,) or found.labels.shape != (n,):
            raise InputError(f"{path}: positions, labels and logits are of {found.logits.shape[:1]} images or disagree")
        if not np.isfinite(found.logits).all():
            raise InputError(f"{path}: some logits are not finite; the run has diverged")
        if found.labels.min() < 0 or found.labels.max() >= classes:
            raise InputError(f"{path}: labels from {found.labels.min()} to {found.labels.max()} for {classes} classes")
        return found

    def terms(self) -> Array:
        """Per image [2 + BINS, n]: 1 where right; negative log-likelihood; confidence minus right, in its bin's row."""
        logits = self.logits.astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        log_sum = np.log(np.exp(logits).sum(1))
        n = np.arange(len(self.labels))
        right = (logits.argmax(1) == self.labels).astype(np.float64)
        confidence = np.exp(-log_sum)  # of the largest logit, which is 0 by now
        rows = np.zeros((2 + BINS, len(n)), np.float32)
        rows[0], rows[1] = right, log_sum - logits[n, self.labels]
        rows[2 + np.minimum((confidence * BINS).astype(int), BINS - 1), n] = confidence - right
        return rows


@dataclass(frozen=True)
class Effect:
    """A mean difference with its 95 % interval, in the metric's units."""

    value: float
    low: float
    high: float
    seeds: int

    @property
    def sure(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


class Comparison:
    """The metrics of runs on the same images, and on `resamples` joint resamples of those images.

    Args:
        runs: names and predictions, of which one at a time is held. Raises InputError where two runs did not see the
            same images.
        seed: of the resampling; the same runs in the same order give the same intervals.
    """

    def __init__(self, runs: Iterable[tuple[str, Predictions]], resamples: int = 2000, seed: int = 0):
        self._seed, self._rng = seed, np.random.default_rng(seed)
        terms = {name: predictions.terms() for name, predictions in same_images(runs)}
        if not terms:
            raise InputError("no run to compare has predictions")
        self._right = {name: rows[0] > 0.5 for name, rows in terms.items()}
        n = self.images
        self._value = {name: metrics(rows.sum(1, dtype=np.float64)[None] / n)[:, 0] for name, rows in terms.items()}
        parts: dict[str, list[Array]] = {name: [] for name in terms}
        for start in range(0, resamples, CHUNK):
            weights = self._resample(min(CHUNK, resamples - start), n)
            for name, rows in terms.items():
                parts[name].append(metrics((weights @ rows.T) / n))
        self._resampled = {name: np.concatenate(found, 1) for name, found in parts.items()}  # [metrics, resamples]

    def _resample(self, count: int, n: int) -> Array:
        """How often each of n images is drawn in n draws with replacement, `count` times: [count, n]."""
        drawn = self._rng.integers(0, n, (count, n)) + np.arange(count)[:, None] * n
        return np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n).astype(np.float32)

    @property
    def images(self) -> int:
        return len(next(iter(self._right.values())))

    def value(self, run: str, metric: str) -> float:
        return float(self._value[run][METRICS.index(metric)])

    def effect(self, pairs: Sequence[tuple[str, str]], metric: str) -> Effect:
        """The mean of (first - second) over pairs of runs, one pair per seed.

        The variance of its error has two parts. One belongs to the seeds: the variance of their mean, with Student's t
        for so few. The other belongs to the images and is the same for every seed; it is what the joint resamples
        show, less the noise of an image within a seed, which the first part holds already. With a single seed the
        interval is over images alone and says nothing of other seeds.
        """
        row, seeds = METRICS.index(metric), len(pairs)
        at_hand = np.array([self._value[a][row] - self._value[b][row] for a, b in pairs])
        resampled = np.stack(
            [self._resampled[a][row] - self._resampled[b][row] for a, b in pairs]
        )  # [seeds, resamples]
        mean = float(at_hand.mean())
        over_images = resampled.mean(0) - resampled.mean()  # centred, as a resample's calibration error is biased
        rng = np.random.default_rng([self._seed, 1])  # alike for every effect, so equal pairs have equal intervals
        draws = over_images[rng.integers(0, over_images.size, DRAWS)]
        if seeds > 1:
            total = over_images.var()
            within = (resampled.var(1).mean() - total) / (seeds - 1)
            shared = min(max(1 - within / total, 0.0), 1.0) if total > 0 else 0.0
            of_seeds = np.sqrt(at_hand.var(ddof=1) / seeds) * rng.standard_t(seeds - 1, DRAWS)
            draws = draws * np.sqrt(shared) + of_seeds
        low, high = np.quantile(draws, (0.025, 0.975))
        return Effect(mean, mean + float(low), mean + float(high), seeds)

    def flips(self, pairs: Sequence[tuple[str, str]]) -> tuple[int, int]:
        """Images that only the first run, and that only the second has right: McNemar's counts, over all pairs."""
        gained = sum(int((self._right[a] & ~self._right[b]).sum()) for a, b in pairs)
        lost = sum(int((~self._right[a] & self._right[b]).sum()) for a, b in pairs)
        return gained, lost


def metrics(means: Array) -> Array:
    """top1, ece and nll [3, B] from means of the per-image terms [B, 2 + BINS]."""
    found = {"top1": means[:, 0], "ece": np.abs(means[:, 2:]).sum(1), "nll": means[:, 1]}
    return np.stack([found[name].astype(np.float64) * PERCENT[name] for name in METRICS])


def same_images(runs: Iterable[tuple[str, Predictions]]) -> Iterator[tuple[str, Predictions]]:
    """The runs, each compared with the first."""
    first: tuple[str, Array, Array, int] | None = None
    for name, run in runs:
        classes = run.logits.shape[1]
        if first is None:
            first = (name, run.positions, run.labels, classes)
        if not (np.array_equal(first[1], run.positions) and np.array_equal(first[2], run.labels)):
            raise InputError(
                f"{first[0]} and {name} were measured on different validation images ({len(first[2])} and "
                f"{len(run.labels)}, or in another order), so their difference says nothing; use the same data.val"
            )
        if classes != first[3]:
            raise InputError(f"{first[0]} knows {first[3]} classes and {name} {classes}")
        yield name, run
