"""SimCLR: a simple framework for contrastive learning of visual representations (Chen et al. 2020)."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from penstock import distributed
from penstock.backbones import Backbone
from penstock.backbones.batchnorm import BatchNorm, convert, set_valid
from penstock.errors import InputError
from penstock.recipe import Block
from penstock.schedule import Knob
from penstock.streams.batch import Batch
from penstock.task import StepOutput, Task, weighted_mean


def nt_xent(z: Tensor, valid: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The normalised-temperature cross-entropy of two views, against the samples of all ranks.

    Each of a sample's two embeddings must be told from the 2NW - 2 embeddings of other samples as the partner of the
    other. Samples that are not valid are neither anchors, partners nor negatives.

    Args:
        z: [2B, D], view 1 of the rank's B samples, then view 2.
        valid: bool [B].

    Returns:
        The loss [B] of each local sample, the mean over its two views, and whether the partner came first [B]; both
        are meaningless where a sample is not valid. In at least fp32.
    """
    rows, batch = len(z), len(valid)
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
        everyone = distributed.gather(z)
        counts = distributed.gather(valid.repeat(2).to(z.dtype)) > 0
        logits = z @ everyone.T / temperature
        index = torch.arange(rows, device=z.device)
        start = distributed.rank() * rows if len(everyone) > rows else 0
        partner = (logits.gather(1, (start + (index + batch) % rows)[:, None]))[:, 0]
        ignored = ~counts[None] | (start + index[:, None] == torch.arange(len(everyone), device=z.device))
        # A finite fill: a row without any valid embedding would have no gradient but NaN.
        logits = logits.masked_fill(ignored, torch.finfo(logits.dtype).min)
        loss = logits.logsumexp(1) - partner
        first = partner.detach() >= logits.detach().amax(1)
    return loss.view(2, batch).mean(0), first.view(2, batch).to(loss.dtype).mean(0)


class SimCLR(Task):
    """Two views of an image agree, and differ from every other image of the global batch.

    The projector's batch normalisation covers all ranks, as does the backbone's unless `sync_batchnorm` is off, so
    the number of ranks changes nothing but the speed.
    """

    looks_across_samples: ClassVar[bool] = True

    class Config(Block):
        name: Literal["simclr"] = "simclr"
        temperature: Knob = Field(0.1, description="divides the cosine similarities; 0.5 suits small batches")
        hidden: int = Field(2048, gt=0, description="width of the projector's hidden layers")
        out: int = Field(128, gt=0, description="dimension in which views are compared")
        layers: int = Field(2, ge=1, le=4, description="linear layers of the projector; 3 in SimCLR v2")
        sync_batchnorm: bool = Field(True, description="backbone BatchNorm over all ranks; the projector's always is")

    @classmethod
    def conflicts(cls, recipe: Any) -> list[str]:
        from penstock.augment import views_of

        views = views_of(recipe.augment)
        if views == 2:
            return []
        return [f"augment.name: simclr compares two views, and {recipe.augment.name} makes {views}; set augment=simclr"]

    def __init__(self, config: Config, backbone: Backbone, seed: int = 0):
        super().__init__()
        self.config = config
        if config.sync_batchnorm:
            backbone.model = convert(backbone.model)
        self.backbone = backbone
        widths = [backbone.dim, *[config.hidden] * (config.layers - 1), config.out]
        blocks: list[nn.Module] = []
        for depth, (inputs, outputs) in enumerate(pairwise(widths)):
            last = depth == config.layers - 1
            # As in the paper's code: every linear layer is normalised; the last has no shift and no activation.
            blocks += [nn.Linear(inputs, outputs, bias=False), BatchNorm(outputs, bias=not last)]
            blocks += [] if last else [nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(*blocks)

    def forward(self, batch: Batch, knobs: Mapping[str, float]) -> StepOutput:
        if len(batch.views) != 2:
            raise InputError(
                f"simclr compares two views of each image, but the batch holds {len(batch.views)}; "
                "choose an augmentation that makes two, for instance augment=simclr"
            )
        set_valid(self, batch.weights)
        z = self.projector(self.backbone(torch.cat(batch.views)).pooled)
        loss, first = nt_xent(z, batch.weights > 0, knobs["temperature"])
        # Equal embeddings make every candidate equally likely.
        self.collapse_loss = math.log(2 * len(batch) * distributed.world() - 1)
        return StepOutput(
            loss=weighted_mean(loss, batch.weights),
            weight=batch.weights.sum(),
            metrics={"contrast_top1": weighted_mean(100 * first, batch.weights).detach()},
        )
