"""Temperature scaling: a classifier's confidence put right by one number, fitted and tested on different samples."""

from typing import NamedTuple

from torch import Tensor

from penstock.classification import judge
from penstock.errors import InputError
from penstock.keyed import key, splitmix64_tensor
from penstock.reliability import Reliability, reliability

HALVES = 0xCA11B  # the stream of random numbers that splits a validation set in two
LIMITS = (0.01, 100.0)  # temperatures looked at: where every answer is right the likeliest is 0, at chance infinity
TOLERANCE, MOST_STEPS = 1e-6, 100


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T that makes logits / T likeliest (Guo et al. 2017), between 0.01 and 100.

    The negative log-likelihood is convex in 1 / T: Newton's method finds its minimum, with halving where a step would
    leave the interval known to hold it. Accuracy does not change, and the likelihood of this data never falls.

    Args:
        logits: [n, K], finite.
        labels: int64 [n], classes in [0, K).
    """
    if len(logits) == 0:
        raise InputError("there is no sample to fit a temperature to; give a validation set that is not empty")
    if not logits.isfinite().all():
        raise InputError("a temperature cannot be fitted: some logits are not finite; the classifier has diverged")
    logits = logits.double()
    logits = logits - logits.amax(1, keepdim=True)
    truth = logits.gather(1, labels[:, None])[:, 0]

    def slope(scale: float) -> tuple[float, float]:
        """First and second derivative of the mean negative log-likelihood by 1 / T."""
        probabilities = (logits * scale).softmax(1)
        mean = (probabilities * logits).sum(1)
        variance = (probabilities * (logits - mean[:, None]).square()).sum(1)
        return (mean - truth).mean().item(), variance.mean().item()

    low, high = 1 / LIMITS[1], 1 / LIMITS[0]
    scale = 1.0
    first, second = slope(scale)
    if first == 0:  # logits that are all equal, say: no temperature is better
        return 1.0
    limit = low if first > 0 else high
    if slope(limit)[0] * first >= 0:
        return 1 / limit
    for _ in range(MOST_STEPS):
        low, high = (low, scale) if first > 0 else (scale, high)
        newton = scale - first / second if second > 0 else low
        after = newton if low < newton < high else (low * high) ** 0.5
        if abs(after - scale) <= TOLERANCE * scale:
            break
        scale = after
        first, second = slope(scale)
    return 1 / scale


class Calibrated(NamedTuple):
    """What temperature scaling does to samples that the temperature was not fitted to."""

    temperature: float
    before: Reliability
    after: Reliability
    nll_before: float  # nats
    nll_after: float

    @property
    def metrics(self) -> dict[str, float]:
        """`ece` in per cent, `nll` in nats, of the samples measured."""
        return {
            "temperature": self.temperature,
            "ece_unscaled": 100 * self.before.error,
            "ece_scaled": 100 * self.after.error,
            "nll_unscaled": self.nll_before,
            "nll_scaled": self.nll_after,
        }


def calibrate(logits: Tensor, labels: Tensor, positions: Tensor, seed: int) -> Calibrated:
    """Fit the temperature to one half of a validation set, and measure what it does to the other.

    Args:
        logits: [n, K], finite.
        labels: int64 [n], classes in [0, K).
        positions: int64 [n], the samples' distinct numbers, which with the seed decide the halves, in any order.
    """
    if len(logits) < 2:
        raise InputError(
            f"a validation set of {len(logits)} cannot be halved to fit and to test a temperature; give a larger one"
        )
    fit, test = halves(positions, seed)
    temperature = fit_temperature(logits[fit], labels[fit])
    logits, labels = logits[test], labels[test]
    before, after = judge(logits, labels), judge(logits / temperature, labels)
    return Calibrated(
        temperature,
        reliability(before.confidence, before.correct),
        reliability(after.confidence, after.correct),
        before.nll.mean().item(),
        after.nll.mean().item(),
    )


def halves(positions: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers of two halves (the second larger by one when odd), by a hash of (seed, position)."""
    order = splitmix64_tensor(positions ^ (key(seed, HALVES) >> 1)).argsort()
    return order[: len(order) // 2].sort().values, order[len(order) // 2 :].sort().values
