"""What a checkpoint's positions mean, and whether they mean the same now."""

from collections.abc import Iterator, Mapping
from typing import Any

WORDS = {
    "manifest": "the training set is another one (or was packed anew)",
    "samples_per_epoch": "the training set has another number of samples",
    "labels": "data.labels chooses other samples",
    "repeats": "data.repeats differs",
    "seed": "the seed differs",
    "order_version": "this Penstock orders samples differently",
    "lanes": "data.lanes differs",
    "block": "data.block differs",
    "window": "data.window differs",
    "mixture_version": "this Penstock mixes sets differently",
    "weight": "the weight differs (to change one on the way, plan it from the start as a curve, such as name: step)",
    "classes": "the classes of the mixture, or the maps to them, differ",
    "clock": "weights follow curves, and the run's length in steps, or its batch, differs",
}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """In words, what of a `TrainStream.identity` differs from a checkpoint's."""
    before, after = saved.get("sets"), now.get("sets")
    if (before is None) != (after is None):
        then, here = ("one set" if sets is None else f"a mixture of {', '.join(sets)}" for sets in (before, after))
        yield f"data.train is {here} now and was {then}"
        return
    if before is None or after is None:
        yield from _differing(saved, now, "")
        return
    if before.keys() != after.keys():
        yield from (f"data.train.{name} is not in the checkpoint" for name in after if name not in before)
        yield from (f"data.train.{name} is gone" for name in before if name not in after)
        return
    for name in after:
        yield from _differing(before[name], after[name], f"data.train.{name}: ")
    rest = {name: value for name, value in now.items() if name != "sets"}
    yield from _differing(saved, rest, "")


def _differing(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> Iterator[str]:
    for name, value in now.items():
        if saved.get(name) != value:
            yield f"{where}{WORDS.get(name, name)} ({saved.get(name)} in the checkpoint, {value} now)"
    yield from (f"{where}{WORDS.get(name, name)} (none now)" for name in saved if name not in now and name != "sets")
