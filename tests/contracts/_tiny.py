"""Small models and batches with which any method can be tried."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from penstock.augment import AUGMENTATIONS, views_of
from penstock.backbones import Backbone
from penstock.errors import InputError
from penstock.recipe import Source, check
from penstock.streams.batch import Batch
from penstock.task import Task
from pretrain.recipe import METHODS, Pretrain
from tests.shards import write_set

SIZE = 16
BACKBONES: dict[str, dict[str, Any]] = {
    "vit": {
        "name": "vit_tiny_patch16_224",
        "size": SIZE,
        "options": {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2},
    },
    "cnn": {"name": "test_resnet", "size": SIZE},
}
# Smaller than the defaults, to save time; a method that is not here is tried with its defaults.
SMALLER: dict[str, dict[str, Any]] = {
    "mae": {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
    "simclr": {"hidden": 64, "out": 16},
}


@cache
def _some_set() -> tempfile.TemporaryDirectory:
    """A packed set for recipes to name; nothing is read from it."""
    folder = tempfile.TemporaryDirectory(prefix="penstock-test-")
    write_set(Path(folder.name), [3])
    return folder


def recipe_of(method: str, backbone: str) -> Pretrain | None:
    """A recipe of the method with the first augmentation that it accepts; None where it refuses the backbone."""
    for augment in AUGMENTATIONS.names():
        values = {
            "name": "contract",
            "duration": "2 steps",
            "batch": 8,
            "data": {"train": _some_set().name},
            "augment": {"name": augment, "size": SIZE},
            "backbone": BACKBONES[backbone],
            "method": {"name": method, **SMALLER.get(method, {})},
            "optim": {"lr": 0.01},
            "engine": {"precision": "fp32"},
        }
        try:
            return check(Pretrain, Source(values=values))
        except InputError as error:
            refused = str(error)
    assert "backbone.name" in refused, refused
    return None


def task_of(recipe: Pretrain, seed: int = 0) -> Task:
    torch.manual_seed(seed)
    return METHODS.get(recipe.method.name)(recipe.method, Backbone(recipe.backbone), seed)


def batch_of(recipe: Pretrain, positions: list[int], bad: tuple[int, ...] = (), noise_in_bad: int = 0) -> Batch:
    """Images that are a function of their positions; at the positions `bad`, of `noise_in_bad` and weight 0."""
    views = []
    for view in range(views_of(recipe.augment)):
        rows = [
            torch.Generator().manual_seed(1000 * view + 7 * p + (noise_in_bad if p in bad else 0)) for p in positions
        ]
        shape = (recipe.data.channels, SIZE, SIZE)
        views.append(torch.stack([torch.randint(0, 256, shape, generator=row, dtype=torch.uint8) for row in rows]))
    weights = torch.tensor([0.0 if p in bad else 1.0 for p in positions])
    where = torch.tensor(positions)
    return Batch(views, where % 3, weights, where, [str(p) for p in positions])
