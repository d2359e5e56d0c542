"""Whether batch normalisation is well: figures for the journal, and a line for people."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penstock import distributed
from penstock.backbones.batchnorm import BatchNorm


@dataclass(frozen=True)
class BatchNormHealth:
    """The state of a module's batch normalisation.

    Attributes:
        smallest_var: the smallest running variance of any channel, in `layer`; near 0 the channel is dead, and its
            noise is blown up by up to 1 / sqrt(eps).
        rank_gap: how far a rank's running mean lies from the mean of all ranks', at most, in standard deviations;
            0 when statistics are synchronised or were just averaged.
        effective_batch: samples that share statistics in training: a micro-batch, of all ranks with `sync`. Gradient
            accumulation does not enlarge it, and moves running statistics once per micro-batch. 0 before training,
            and when frozen.
        drift: distance of the last batch's mean from the running mean, root mean square over channels, in standard
            deviations, of the layer where it is largest; nan before training, and when frozen.
    """

    layers: int
    layer: str
    smallest_var: float
    rank_gap: float
    effective_batch: int
    drift: float

    def metrics(self) -> dict[str, float]:
        found = {
            "health/bn_smallest_var": self.smallest_var,
            "health/bn_rank_gap": self.rank_gap,
            "health/bn_effective_batch": float(self.effective_batch),
            "health/bn_drift": self.drift,
        }
        return {name: value for name, value in found.items() if value == value}

    def __str__(self) -> str:
        batch = f"over {self.effective_batch} samples" if self.effective_batch else "not updated"
        drift = f", drift {self.drift:.2g} standard deviations" if self.drift == self.drift else ""
        return (
            f"batch norm: {self.layers} layers, statistics {batch}; smallest variance {self.smallest_var:.2g} "
            f"({self.layer}), gap between ranks {self.rank_gap:.2g}{drift}"
        )


@torch.no_grad()
def batchnorm_health(module: nn.Module) -> BatchNormHealth | None:
    """The health of every batch norm in `module` that keeps statistics, or None when there is none.

    Every rank calls it: it gathers the running statistics once. Effective batch and drift are known for our own layers
    (`convert`), the other figures for torch's and timm's, too.
    """
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
    }
    if not layers:
        return None
    means = {name: _wide(layer.running_mean) for name, layer in layers.items()}
    variances = {name: _wide(layer.running_var) for name, layer in layers.items()}
    eps = torch.cat([torch.full_like(means[name], layer.eps) for name, layer in layers.items()])
    own = torch.stack([torch.cat(list(means.values())), torch.cat(list(variances.values()))])
    everyone = distributed.gather(own[None])  # [world, 2, C of all layers]
    mean, var = everyone.mean(0)
    gap = float(((everyone[:, 0] - mean).abs() / (var + eps).sqrt()).max())
    smallest = torch.stack([each.min() for each in variances.values()])
    ours = {name: layer for name, layer in layers.items() if isinstance(layer, BatchNorm) and layer.batch_samples}
    drifts = [
        ((_wide(layer.batch_mean) - means[name]).square() / (variances[name] + layer.eps)).mean().sqrt()
        for name, layer in ours.items()
    ]
    return BatchNormHealth(
        layers=len(layers),
        layer=list(layers)[int(smallest.argmin())],
        smallest_var=float(smallest.min()),
        rank_gap=gap,
        effective_batch=max((layer.batch_samples for layer in ours.values()), default=0),
        drift=float(torch.stack(drifts).max()) if drifts else float("nan"),
    )


def _wide(values: Tensor | None) -> Tensor:
    assert values is not None
    return values.detach().float()
