"""Decoded images of a packed set, by (shard number, number within the shard)."""

import mmap
import multiprocessing
import os
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np

from penstock.augment import Whole
from penstock.errors import InputError
from penstock.streams.decode import DecodeError, NeedOf, decode, decode_smaller
from penstock.streams.positions.mixture import open_reader
from penstock.streams.reader import ShardReader
from penstock.streams.sets.manifest import Manifest
from penstock.streams.sets.storage import Fault
from penstock.streams.timing import DECODE, READ


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample; without an image where it cannot be read, and then with the reason."""

    image: np.ndarray | None  # uint8 [H, W, C]; not to be written to, it may be the cache
    label: int
    key: str
    id: int
    reason: str = ""
    whole: Whole | None = None  # where the image was decoded smaller
    kind: str = ""  # of the reason, for counts


class Images:
    """Reads, checks and decodes.

    Args:
        channels: 3 for RGB, 1 for greyscale.
        cache: "ram" keeps every decoded image, for sets that fit into memory.
        smaller: whether JPEGs may be decoded at a fraction of their size where a view needs no more.
    """

    def __init__(
        self, manifest: Manifest, channels: int = 3, cache: Literal["none", "ram"] = "none", smaller: bool = True
    ):
        manifest.check_files()
        self.manifest, self.channels, self.smaller = manifest, channels, smaller
        self.reader = open_reader(manifest)
        self._cache = _PixelCache(self.reader, channels) if cache == "ram" else None
        self._spent = {READ: 0.0, DECODE: 0.0}

    @property
    def counters(self) -> dict[str, float]:
        """Running counts of this process (penstock/streams/timing.py)."""
        return self._spent | self.reader.counters

    def load(self, shard: int, sample: int, need_of: NeedOf | None = None) -> Sample:
        """One sample, of its JPEG no more than `need_of(height, width)` decoded; all of it for a cache in memory."""
        record = self.reader.record(shard, sample)
        image, whole = self._cache.get(shard, sample) if self._cache else None, None
        if image is None:
            began = read = perf_counter()
            try:
                try:
                    data = self.reader.payload(shard, record)
                finally:
                    read = perf_counter()
                    self._spent[READ] += read - began
                if need_of is None or self._cache or not self.smaller:
                    image = decode(data, self.channels)
                else:
                    image, whole = decode_smaller(data, self.channels, need_of)
            except (Fault, DecodeError) as error:
                return Sample(None, record.label, record.key, record.id, str(error), kind=error.kind)
            finally:
                self._spent[DECODE] += perf_counter() - read
            if self._cache:
                self._cache.put(shard, sample, image)
        return Sample(image, record.label, record.key, record.id, whole=whole)


class _PixelCache:
    """Decoded pixels in memory that forked workers share: each image is decoded once, by whoever needs it first."""

    def __init__(self, reader: ShardReader, channels: int):
        numbers = range(len(reader.manifest.shards))
        self.shapes = [
            np.stack([reader.column(number, "height"), reader.column(number, "width")], 1).astype(np.int64)
            for number in numbers
        ]
        self.channels = channels
        self.first = np.cumsum([0, *(len(shape) for shape in self.shapes)])
        sizes = np.concatenate([shape.prod(1) for shape in self.shapes]) * channels
        self.begins = np.concatenate([[0], np.cumsum(sizes)])
        total, memory = int(self.begins[-1]), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this machine, each with a cache of its own
        if total * ranks > memory / 2:
            raise InputError(
                f"data.cache: the decoded images of {reader.manifest.root} take {total / 1e9:.1f} GB for each of "
                f"{ranks} ranks, and this machine has {memory / 1e9:.1f} GB, of which half may be taken; "
                "write data.cache=none"
            )
        self.pixels = np.frombuffer(mmap.mmap(-1, max(total, 1)), dtype=np.uint8)
        self.filled = np.frombuffer(mmap.mmap(-1, len(sizes)), dtype=np.uint8)
        self.lock = multiprocessing.get_context("fork").Lock()  # orders the flag after the pixels on every CPU

    def get(self, shard: int, sample: int) -> np.ndarray | None:
        number, place = self._place(shard, sample)
        with self.lock:
            return place if self.filled[number] else None

    def put(self, shard: int, sample: int, image: np.ndarray) -> None:
        number, place = self._place(shard, sample)
        if image.shape != place.shape:  # the index does not know the size, or Exif turned the image
            return
        place[:] = image
        with self.lock:
            self.filled[number] = 1

    def _place(self, shard: int, sample: int) -> tuple[int, np.ndarray]:
        number = int(self.first[shard]) + sample
        height, width = self.shapes[shard][sample].tolist()
        place = self.pixels[self.begins[number] : self.begins[number + 1]]
        return number, place.reshape(height, width, self.channels)
