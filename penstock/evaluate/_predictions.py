"""The file of a classifier's answers."""

from pathlib import Path
from typing import Any

import numpy as np

from penstock.evaluate._features import FeatureSet
from penstock.streams.sets.atomic import replacing


def write_predictions(path: Path, answers: FeatureSet) -> None:
    """A .npz that is whole or absent, and holds no pickle.

    It holds positions int64 [n], increasing, labels int64 [n] and logits float32 [n, K].

    Args:
        answers: logits as features.
    """
    columns = {"positions": answers.positions, "labels": answers.labels, "logits": answers.features}
    arrays: dict[str, Any] = {name: values.numpy() for name, values in columns.items()}
    with replacing(path) as file:
        np.savez(file, **arrays)
