"""The images that forms are compared on and calibrated with, prepared as in evaluation."""

from collections.abc import Iterator

import torch
from torch import Tensor

from penstock.class_names import check_classes
from penstock.errors import InputError
from penstock.formats.about import About
from penstock.streams.evaluation import EvalStream
from penstock.streams.images import Images
from penstock.streams.sets.manifest import Manifest


def batches(
    manifest: Manifest, about: About, size: int = 64, limit: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images uint8 [B, C, H, W], labels int64 [B]) of those that can be read, in the set's order.

    Labels are -1 where there is none, or no class that it could stand for.
    """
    augment = about.preprocessing.augment()
    stream = EvalStream(Images(manifest, about.preprocessing.channels), augment, batch=size, limit=limit)
    for batch in stream:
        good = batch.weights > 0
        if good.any():
            labels = batch.labels if about.classes is not None else torch.full_like(batch.labels, -1)
            yield batch.views[0][good], labels[good]


def check_labels(about: About, manifest: Manifest) -> None:
    """InputError unless the set's labels mean what the network's do."""
    if about.classes is not None and manifest.classes is not None:
        check_classes(about.classes, manifest.classes, str(manifest.root))


def first(manifest: Manifest, about: About, count: int) -> Tensor:
    """At most `count` images of a fixed subset of a set.

    Raises:
        InputError: none can be read.
    """
    parts = [images for images, _ in batches(manifest, about, limit=count)]
    if not parts:
        raise InputError(f"none of the first images of {manifest.root} can be read; see `penstock shards verify`")
    return torch.cat(parts)
