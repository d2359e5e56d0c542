"""What a cache of answers holds, and whether the teacher says it again."""

from dataclasses import dataclass

import numpy as np
import torch

from finetune.answers import Cache, restore
from finetune.cache_writer import Pool
from penstock.keyed import key
from penstock.splitmix import splitmix64_array
from penstock.streams.loader import Micro, assemble
from penstock.streams.sets.storage import Fault

SAMPLED = 20_000  # images whose answers are counted
CHECKED = 0xC4EC << 44  # the stream of random numbers that picks the views which are checked


@dataclass(frozen=True)
class Facts:
    """Of the answers in a cache."""

    unreadable: int  # images, of all
    images: int  # spread evenly over the set, of whose views the means below are
    top1: float  # per cent of the labelled views that the teacher names right
    mass: float  # mean probability of the classes that were kept


def facts(pool: Pool, cache: Cache, most: int = SAMPLED) -> Facts:
    """What the index says of all images, and the answers of up to `most` of them."""
    sidecar, names = cache.sidecar(pool.manifest), cache.layout.kind.names or ()
    images, right, labelled, mass, views = 0, 0, 0, 0.0, 0
    bounds = _bounds(pool)
    total = int(bounds[-1])
    for number in np.unique(np.linspace(0, total - 1, min(most, total)).astype(np.int64)):
        shard = int(np.searchsorted(bounds, number, side="right")) - 1
        sample = int(number - bounds[shard])
        record = pool.images.reader.record(shard, sample)
        try:
            rows = sidecar.rows(shard, sample, record.key)
        except Fault:
            continue
        said = rows["classes"][:, 0] if "classes" in names else rows["logs"].argmin(1)
        images, views = images + 1, views + len(rows)
        mass += float((1 - np.exp(rows["rest"].astype(np.float64))).sum()) if "rest" in names else len(rows)
        if record.label >= 0:
            labelled += len(rows)
            right += int((said == record.label).sum())
    return Facts(sidecar.missing(), images, 100 * right / max(labelled, 1), mass / max(views, 1))


def _bounds(pool: Pool) -> np.ndarray:
    """The number of each shard's first sample, and that of all samples."""
    return np.cumsum([0, *(shard.samples for shard in pool.manifest.shards)])


@dataclass(frozen=True)
class Checked:
    """The teacher's answers to some views, once more."""

    views: int
    apart: float  # largest difference of probabilities, of a kept class or of all others together
    lost: dict[int, float]  # by temperature: mean T^2 KL of the whole answer and the restored one


def check_again(pool: Pool, cache: Cache, count: int, batch: int) -> Checked:
    """Ask the teacher again for up to `count` views, drawn at random, and compare with what the cache says.

    Raises:
        Fault: an answer cannot be read.
    """
    sidecar, views, classes = cache.sidecar(pool.manifest), cache.identity.pool, len(cache.identity.classes)
    bounds = _bounds(pool)
    draws = splitmix64_array(np.arange(count, dtype=np.uint64) ^ np.uint64(key(pool.recipe.seed, CHECKED)))
    chosen = np.unique((draws % np.uint64(bounds[-1] * views)).astype(np.int64))
    apart, lost, seen = 0.0, dict.fromkeys((1, 4), 0.0), 0
    for begin in range(0, len(chosen), batch):
        numbers, again = np.divmod(chosen[begin : begin + batch], views)
        shards = np.searchsorted(bounds, numbers, side="right") - 1
        micro = Micro(numbers, shards, numbers - bounds[shards], pool.knobs, step=0, pool=again)
        found = assemble(micro, pool.images, pool.augment, pool.recipe.seed, sidecar)
        good = found.weights > 0
        whole = pool.answer(found).double().cpu()[good].log_softmax(1)
        kept = restore(found.extra, classes).double()[good].log_softmax(1)
        differ = (whole.exp() - kept.exp()).abs()
        if "classes" in found.extra:
            inside = torch.zeros_like(differ).scatter(1, found.extra["classes"][good], 1.0)
            rest = ((whole.exp() - kept.exp()) * (1 - inside)).sum(1).abs()
            differ = torch.cat([differ * inside, rest[:, None]], 1)
        apart = max(apart, float(differ.max())) if differ.numel() else apart
        for temperature in lost:
            p, q = ((each / temperature).log_softmax(1) for each in (whole, kept))
            lost[temperature] += float(temperature**2 * (p.exp() * (p - q)).sum())
        seen += int(good.sum())
    return Checked(seen, apart, {temperature: value / max(seen, 1) for temperature, value in lost.items()})
