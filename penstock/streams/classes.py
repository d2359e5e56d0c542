"""The classes of a run: one list that training and validation set must agree on."""

from penstock.class_names import check_classes
from penstock.errors import InputError
from penstock.streams.data import Data
from penstock.streams.positions.mixture import open_reader
from penstock.streams.sets.manifest import Manifest


def class_names(data: Data) -> tuple[str, ...]:
    """Names in label order; '0', '1', ... for sets that came with numbers alone.

    Raises:
        InputError: a sample without a label or with one out of range, or other classes in the validation set, or in
            another order.
    """
    sets = [("data.train", data.train)] + ([("data.val", data.val)] if data.val is not None else [])
    for key, manifest in sets:
        if manifest.unlabelled:
            raise InputError(
                f"{key}: {manifest.unlabelled} of {manifest.samples} samples of {manifest.root} have no label; "
                "pack it from a folder per class, or leave such sets of a mixture out"
            )
    largest, _ = _largest_label(data.train)
    names = data.train.classes or tuple(str(label) for label in range(largest + 1))
    if data.val is not None and data.val.classes and data.train.classes:
        check_classes(data.train.classes, data.val.classes, str(data.val.root), "the training set")
    for key, manifest in sets:
        label, sample = _largest_label(manifest)
        if label >= len(names):
            raise InputError(
                f"{key}: sample {sample} of {manifest.root} has label {label}, but there are {len(names)} classes, "
                f"0 to {len(names) - 1}; pack the set with the classes of the training set"
            )
    if len(names) < 2:
        raise InputError(f"data.train: {data.train.root} has one class alone, so there is nothing to tell apart")
    return names


def _largest_label(manifest: Manifest) -> tuple[int, str]:
    """The largest label of a set, and the key of a sample that has it."""
    reader, best = open_reader(manifest), (-1, "")
    for shard in range(len(manifest.shards)):
        labels = reader.column(shard, "label")
        if len(labels) and int(labels.max()) > best[0]:
            best = int(labels.max()), reader.record(shard, int(labels.argmax())).key
    return best
