"""A set whose samples have captions, boxes, masks and arrays, and a stream of it."""

import io
import json
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from penstock.augment.none import NoAugmentation
from penstock.schedule import Clock
from penstock.streams.batch import Batch
from penstock.streams.data import Data
from penstock.streams.sets.foreign import index_folder
from penstock.streams.train import TrainStream
from tests.shards import number_of, pixels_of, png

TOTAL, PER_TAR = 29, 6
EXTRA = {"caption": "txt", "boxes": "json", "mask": "mask.png", "vector": "npy"}


def npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


def members_of(number: int) -> dict[str, Any]:
    """What sample `number` has beside its image; every fifth has no caption."""
    found: dict[str, Any] = {
        "boxes": {"boxes": [[number, 0, 1, 1]] * (number % 4)},
        "mask": np.full((8 + number, 5), number, dtype=np.uint8),
        "vector": np.arange(number % 3, dtype=np.float32) + number,
    }
    return found | ({"caption": f"größe {number}"} if number % 5 else {})


def encoded(members: dict[str, Any]) -> dict[str, bytes]:
    ways = {
        "caption": lambda text: text.encode(),
        "boxes": lambda value: json.dumps(value).encode(),
        "mask": png,
        "vector": npy,
    }
    return {EXTRA[name]: ways[name](value) for name, value in members.items()}


def write_set(folder: Path, members=lambda number: encoded(members_of(number)), total: int = TOTAL) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, total, PER_TAR):
        with tarfile.open(folder / f"{first:04d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(first, min(first + PER_TAR, total)):
                files = {"png": png(pixels_of(number)), "cls": str(number % 7).encode(), **members(number)}
                for suffix, content in sorted(files.items()):  # as webdataset's writer does, so some precede the image
                    info = tarfile.TarInfo(f"s{number:03d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    index_folder(folder, workers=1, show=False, extra=("mask.png",))
    return folder


def stream(folder: Any, after=(), *, batch=8, rank=0, world=1, augment=None, seed=5, **data) -> TrainStream:
    return TrainStream(
        Data.Config(train=folder, **({"workers": 0, "lanes": 4} | data)),
        augment or NoAugmentation(NoAugmentation.Config(size=8)),
        batch=batch,
        accumulation=1,
        rank=rank,
        world=world,
        seed=seed,
        clock=Clock(100, batch, TOTAL),
        stages=after,
    )


def take(stream: TrainStream, micros: int, since: int = 0) -> list[Batch]:
    return list(islice(stream.batches(since), micros))


def slots(batches: list[Batch]) -> dict[int, Any]:
    """Everything of each slot, by position."""
    return {
        position: {
            "key": batch.keys[slot],
            "number": int(number_of(batch.views[0][slot].numpy())),
            "weight": float(batch.weights[slot]),
            "label": int(batch.labels[slot]),
            "views": [view[slot].clone() for view in batch.views],
            **{name: values[slot] for name, values in batch.members.items()},
            **{name: values[slot].clone() for name, values in batch.extra.items()},
        }
        for batch in batches
        for slot, position in enumerate(batch.positions.tolist())
    }


def same(one: Any, other: Any) -> bool:
    """Equality of nested values that may hold arrays."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, (np.ndarray, torch.Tensor)):
        return type(one) is type(other) and one.dtype == other.dtype and np.array_equal(one, other)
    return type(one) is type(other) and one == other
