"""What a set's images take on this machine, what limits them, and what would help."""

import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np
import torch

from penstock.augment.crop_flip import CropFlip
from penstock.keyed import seed_sample
from penstock.schedule import Clock
from penstock.streams import timing
from penstock.streams.batch import Batch
from penstock.streams.data import Data
from penstock.streams.decode import DecodeError, decode_plan, decode_smaller
from penstock.streams.loader import generators_kept, need_of_views
from penstock.streams.sets.encoded import image_format, image_size
from penstock.streams.sets.jobs import available_cores
from penstock.streams.sets.manifest import Manifest
from penstock.streams.sets.sources.smaller import smaller
from penstock.streams.sets.storage import Fault
from penstock.streams.train import TrainStream

BATCH = 32
TRIED = 48  # images that are looked at closely
WORTH = 1.15  # times as fast, from which on packing anew is suggested
QUALITY = 90


@dataclass
class Findings:
    """Times in seconds an image, of one core."""

    samples: int  # in the set
    shards: int
    size: int  # side of the views
    measured: int = 0  # images
    read: float = 0.0  # as it was found
    again: float = 0.0  # the same images once more, now in memory
    decode: float = 0.0
    augment: float = 0.0
    bytes: float = 0.0  # an image
    unreadable: Counter[str] = field(default_factory=Counter)  # kinds of faults
    kinds: Counter[str] = field(default_factory=Counter)
    plans: Counter[str] = field(default_factory=Counter)  # how images are decoded
    sides: list[tuple[int, int]] = field(default_factory=list)  # (short, long) in pixels
    short_side: int | None = None  # what packing anew at would help, and how much
    gain: float = 1.0
    smaller_bytes: float = 0.0

    @property
    def total(self) -> float:
        return self.read + self.decode + self.augment

    @property
    def limit(self) -> str:
        """What takes most of the time, in a sentence."""
        name, worst = max(
            [("reading", self.read), ("decoding", self.decode), ("augmenting", self.augment)], key=lambda part: part[1]
        )
        share = f"{name.capitalize()} takes most of a worker's time, {worst / self.total:.0%}"
        if name == "reading":
            return (
                f"{share}: the storage limits; more workers wait for it side by side, a cache or faster disk helps more"
            )
        if name == "decoding":
            return f"{share}: the cores limit; more of them help, and images that are smaller or JPEGs"
        return f"{share}: the cores limit; more of them help, and fewer or cheaper augmentations"

    def workers(self, images_per_second: float) -> int:
        return math.ceil(images_per_second * self.total)


def examine(address: str, size: int, seconds: float) -> Findings:
    """Serve a set's samples in training's own order, in this process, on one core. Raises InputError."""
    samples = Manifest.load(address).samples  # says what is wrong in words of its own
    batch = min(BATCH, samples)
    config = Data.Config(train=address, workers=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        augment = CropFlip(CropFlip.Config(size=size))
        clock = Clock(1, batch, samples)
        stream = TrainStream(config, augment, batch=batch, accumulation=1, rank=0, world=1, seed=0, clock=clock)
        found = Findings(stream.manifest.samples, len(stream.manifest.shards), size)
        # Within one epoch no image comes twice: what is read is read as it was found.
        first = _sums(_within(islice(stream.batches(0), samples // batch), seconds / 2), found.unreadable)
        found.measured = int(first[timing.SAMPLES])
        found.read, found.decode, found.augment, found.bytes = (
            first[name] / found.measured for name in (timing.READ, timing.DECODE, timing.AUGMENT, timing.BYTES)
        )
        again = _sums(_within(islice(stream.batches(0), found.measured // batch), seconds), Counter())
        found.again = again[timing.READ] / again[timing.SAMPLES]
        with generators_kept():
            _look_closely(found, stream, augment)
        return found
    finally:
        torch.set_num_threads(threads)


def _within(batches: Iterator[Batch], seconds: float) -> Iterator[Batch]:
    """Batches until the time is over, at least one."""
    began = time.monotonic()
    for batch in batches:
        yield batch
        if time.monotonic() - began > seconds:
            return


def _sums(batches: Iterator[Batch], unreadable: Counter[str]) -> dict[str, float]:
    """What all batches together took; they are let go of one by one. Counts kinds of faults."""
    sums: dict[str, float] = {}
    for batch in batches:
        sums = {name: value + sums.get(name, 0.0) for name, value in batch.timing.items()}
        unreadable.update(fault["kind"] for fault in batch.faults)
    return sums


def _look_closely(found: Findings, stream: TrainStream, augment: CropFlip) -> None:
    """Kinds, sizes and decode plans of some images, and what re-encoding them would bring."""
    positions = np.arange(min(TRIED, found.samples), dtype=np.int64)
    micro = stream.micro(positions, stream.knobs_at(0))
    images: list[bytes] = []
    for shard, sample in zip(micro.shards.tolist(), micro.samples.tolist(), strict=True):
        try:
            data = stream.images.reader.read(shard, sample)[0]
            need_of = partial(need_of_views, augment, micro.knobs, [(0, len(images))])
            plan = decode_plan(data, need_of)
        except (Fault, DecodeError):
            continue
        images.append(data)
        found.kinds[image_format(data) or "other"] += 1
        found.plans[f"{plan.decoder} ({plan.reason})"] += 1
        sides = sorted(image_size(data))
        found.sides.append((sides[0], sides[1]))
    short_side = round(found.size * 512 / 224 / 16) * 16
    if images and np.median([short for short, _ in found.sides]) > short_side:
        _try_smaller(found, images, short_side, augment)


def _try_smaller(found: Findings, images: list[bytes], short_side: int, augment: CropFlip) -> None:
    made: list[tuple[bytes, bytes]] = []
    for data in images:
        try:
            made.append((data, smaller(data, short_side, QUALITY)))
        except DecodeError:
            continue
    if not made:
        return
    now, then = (_took(partial(_views, data, found.size, augment)) for data in zip(*made, strict=True))
    shrunk = sum(len(data) for _, data in made) / max(1, sum(len(data) for data, _ in made))
    gain = found.total / max(found.read * shrunk + (found.decode + found.augment) * then / now, 1e-9)
    if gain > WORTH:
        found.short_side, found.gain, found.smaller_bytes = short_side, gain, found.bytes * shrunk


def _views(images: Sequence[bytes], size: int, augment: CropFlip) -> None:
    knobs = {"size": float(size)}
    for number, data in enumerate(images):
        pixels, whole = decode_smaller(data, 3, partial(need_of_views, augment, knobs, [(0, number)]))
        seed_sample(0, number, 0)
        augment.view(pixels, 0, knobs, whole)


def _took(work: Callable[[], object]) -> float:
    """Seconds, the smaller of two tries."""
    took = []
    for _ in range(2):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)


def report(found: Findings, address: str, images_per_second: float | None) -> str:
    """The findings in words."""
    cores = available_cores()
    short, long = (np.median([each[side] for each in found.sides] or [0]) for side in (0, 1))
    rate = 1 / found.total
    known = "was in memory already, or comes from a fast disk" if found.read < 1.5 * found.again else "came from afar"
    lines = [
        f"{address}: {found.samples:,} images in {found.shards:,} shards; {found.measured:,} measured on one of "
        f"{cores} cores ({platform.machine()}), one random crop to {found.size}",
        f"an image has {short:.0f} x {long:.0f} pixels (medians of the sides) in {found.bytes / 1e3:.1f} kB; "
        f"{_shares(found.kinds)}",
        f"decoded by {_shares(found.plans)}",
        f"ms an image: read {found.read * 1e3:.2f} (once more {found.again * 1e3:.2f}: what was read {known}), decode "
        f"{found.decode * 1e3:.2f}, augment {found.augment * 1e3:.2f}; in all {found.total * 1e3:.2f}, so "
        f"{rate:,.0f} images/s a worker",
        f"{found.limit}.",
    ]
    if found.unreadable:
        lines.append(
            f"{sum(found.unreadable.values())} of them cannot be read ({_shares(found.unreadable)}); "
            f"`penstock shards verify {address}` names every damaged one."
        )
    if images_per_second is not None:
        need = found.workers(images_per_second)
        enough = "" if need <= cores else f", but this machine has {cores} cores: it gives about {cores * rate:,.0f}"
        lines.append(
            f"{images_per_second:,.0f} images/s need {need} workers over all ranks (data.workers = {need} / ranks) and "
            f"{images_per_second * found.bytes / 1e6:,.0f} MB/s{enough}."
        )
    if found.short_side is not None:
        lines.append(
            f"`penstock shards pack --short-side {found.short_side} --quality {QUALITY}` would make it "
            f"{found.gain:.1f} times as fast ({rate * found.gain:,.0f} images/s a worker, "
            f"{found.smaller_bytes / 1e3:.1f} kB an image), where views are {found.size} pixels or smaller."
        )
    return "\n".join(lines)


def _shares(counts: Counter[str]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{name} {count / total:.0%}" for name, count in counts.most_common()) or "none that can be read"
