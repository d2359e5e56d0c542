"""A packed set of JPEGs, a small teacher, and a cache of its answers, for tests."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.answers import Cache, Identity
from finetune.cache_writer import Pool, write_cache
from finetune.teachers import Teacher
from penstock.augment.standard import Standard
from penstock.schedule import Clock
from penstock.streams.batch import Batch
from penstock.streams.data import Data
from penstock.streams.sets.manifest import Manifest
from penstock.streams.train import TrainStream
from tests.shards import write_set
from tests.trees import image_bytes

SIDE, VIEWS, CLASSES = 16, 3, tuple(f"class{number}" for number in range(10))
SIZES = [5, 0, 9, 6]


def make_set(folder: Path) -> Path:
    """JPEGs large enough to be decoded at a half or a quarter for some views, and one PNG."""
    return write_set(
        folder, SIZES, content=lambda n: image_bytes(n, "PNG" if n == 3 else "JPEG", (160, 120)), size=(120, 160)
    ).root


class Projection(nn.Module):
    """Logits that every pixel moves."""

    weight: Tensor

    def __init__(self, seed: int = 0, classes: int = len(CLASSES)):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weight", torch.randn(classes, 3 * SIDE * SIDE, generator=generator) / 8)

    def forward(self, images: Tensor, stages: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        logits = images.flatten(1) @ self.weight.T
        return logits, logits, ()


def teacher(seed: int = 0) -> Teacher:
    return Teacher("projection", Projection(seed), CLASSES, (SIDE, SIDE), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def recipe(folder: Path, seed: int = 4, augment: Mapping[str, Any] | None = None, **data: Any) -> Any:
    options = {"train": folder, "workers": 0, "lanes": 4, "pool": VIEWS} | data
    augmentation = {"size": SIDE, "scale": (0.05, 1.0), "color_jitter": 0.3, "erase": 0.5} | dict(augment or {})
    return SimpleNamespace(
        seed=seed,
        data=Data.Config(**options),
        augment=Standard.Config(**augmentation),
        engine=SimpleNamespace(precision="fp32"),
    )


def identity(made: Any, teaches: Teacher | None = None) -> Identity:
    return Identity.of(made, teaches or teacher(), CLASSES, Manifest.load(made.data.train))


def write(out: Path, made: Any, top: int = len(CLASSES), teaches: Teacher | None = None, batch: int = 8) -> Any:
    teaches = teaches or teacher()
    data, known = Manifest.load(made.data.train), identity(made, teaches)
    pool = Pool(made, data, teaches, known, torch.device("cpu"))
    about = {"teacher": teaches.name, "precision": "fp32", "batch": batch}
    return write_cache(pool, Cache(out, known, top, about), batch, show=False)


def student(made: Any, cache: Cache | None, batch: int = 12, rank: int = 0, world: int = 1) -> TrainStream:
    data = Data(made.data, made.seed)
    return TrainStream(
        made.data,
        Standard(made.augment),
        batch=batch,
        accumulation=1,
        rank=rank,
        world=world,
        seed=made.seed,
        clock=Clock(100, batch, data.part.samples),
        sidecar=cache.sidecar(data.train) if cache else None,
    )


def take(stream: TrainStream, micros: int, since: int = 0) -> list[Batch]:
    return list(islice(stream.batches(since), micros))


def answered(images: Tensor, teaches: Teacher | None = None) -> Tensor:
    """What the teacher says of uint8 views, as log-probabilities."""
    own: Any = teaches or teacher()
    wide = images.float() / 255
    return own((wide - own.mean[:, None, None]) / own.std[:, None, None], own).logits.log_softmax(1)


def pixels(batches: list[Batch]) -> dict[int, np.ndarray]:
    return {p: batch.views[0][slot].numpy() for batch in batches for slot, p in enumerate(batch.positions.tolist())}
