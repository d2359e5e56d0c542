"""Evaluations of frozen features: each file holds one, which takes two `FeatureSet`s and gives metrics by name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from penstock.registry import Registry

if TYPE_CHECKING:
    import torch

    from penstock.backbones import Backbone
    from penstock.streams.batch import Batch

EVALUATIONS = Registry("penstock.evaluate")


@dataclass(frozen=True)
class Measured:
    metrics: dict[str, float]  # per cent, as `knn_top1`
    health: dict[str, float]  # of the validation features, from `penstock.health.feature_health`
    dim: int  # width of the features
    unreadable: int  # samples left out, in both sets, as they could not be read


def measure(
    backbone: "Backbone",
    evaluations: Mapping[str, Any],
    train: "Iterable[Batch]",
    val: "Iterable[Batch]",
    device: "torch.device",
) -> Measured:
    """Every evaluation on the backbone's pooled features; collective, and the same on all ranks.

    The backbone, its training mode and the random generators are left as they were. The backbone runs under the
    caller's autocast, the evaluations in fp32.

    Args:
        evaluations: configs by the component's name, as {"knn": KNN.Config()}.
        train, val: finite streams such as EvalStream, equally many batches on all ranks.

    Raises:
        InputError: a set has no labels or no readable sample.
    """
    import torch

    from penstock.evaluate._features import extract
    from penstock.health import feature_health

    features = extract(backbone, train, device), extract(backbone, val, device)
    metrics: dict[str, float] = {}
    with torch.autocast(device.type, enabled=False):  # figures are exact, whatever the features were computed in
        for name, config in evaluations.items():
            metrics |= EVALUATIONS.get(name)(config)(*features)
    unreadable = sum(part.unreadable for part in features)
    return Measured(metrics, feature_health(features[1].features), features[1].features.shape[1], unreadable)
