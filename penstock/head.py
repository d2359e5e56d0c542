"""What turns a backbone's features into logits: a linear layer, perhaps behind a norm or an attention pooling."""

import math
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from penstock.backbones.backbone import Backbone, Features
from penstock.backbones.batchnorm import BatchNorm
from penstock.errors import InputError
from penstock.recipe import Block

OWN_INITS = ("random", "probe", "weights")
PROBE_EPS = 1e-6  # of the norms, as in MAE's linear probe


class Head(nn.Module):
    """A classifier of features.

    Args:
        dim: width of the pooled features.
        classes: number of classes K.
        backbone: whose features come; its spatial ones are what the attentive head pools.

    `drop` is a dropout before the linear layer, 0 until something sets it.
    """

    class Config(Block):
        kind: Literal["linear", "attentive", "distilled"] = Field(
            "linear",
            description="linear: on pooled features; attentive: pools the spatial ones by attention; distilled: one "
            "layer on the class and one on the distillation token, whose logits are averaged (DeiT)",
        )
        heads: int = Field(8, ge=1, description="attention heads of the attentive kind")
        norm: Literal["none", "batch", "layer"] = Field(
            "none", description="before the linear layer; batch: over all ranks, without scale and shift (MAE's probe)"
        )
        init: str = Field(
            "random",
            description="random; probe: a linear probe of the backbone as it starts (LP-FT); weights: the classifier "
            "in backbone.weights, by class name; or the path of another classifier",
        )
        init_std: float = Field(0.01, ge=0, description="standard deviation of random weights")
        bias: Literal["zero", "prior"] = Field(
            "zero", description="where the bias starts; prior: at -log K, for losses that see each class on its own"
        )

        @model_validator(mode="after")
        def _two_tokens_alone(self) -> "Head.Config":
            if self.kind == "distilled" and self.norm != "none":
                raise ValueError(f"norm: {self.norm} is not for the distilled kind; leave it out")
            return self

        @field_validator("init")
        @classmethod
        def _exists(cls, init: str) -> str:
            if init not in OWN_INITS and not Path(init).expanduser().exists():
                raise ValueError(f"there is no classifier at {init!r}; give its path, or one of {', '.join(OWN_INITS)}")
            return init

    def __init__(self, config: "Head.Config", dim: int, classes: int, backbone: Backbone):
        super().__init__()
        self.config = config
        self.pool: AttentionPool | None = None
        if config.kind == "attentive":
            dim = backbone.spatial_dim
            self.pool = AttentionPool(dim, config.heads)
        self.norm: nn.Module = nn.Identity()
        if config.norm == "batch":
            self.norm = BatchNorm(dim, eps=PROBE_EPS, affine=False)
        elif config.norm == "layer":
            self.norm = nn.LayerNorm(dim, eps=PROBE_EPS)
        self.drop = nn.Dropout(0.0)
        self.linear = self._linear(dim, classes)
        self.second: nn.Linear | None = None  # on the distillation token
        if config.kind == "distilled":
            if not hasattr(backbone.model, "head_dist"):
                raise InputError(
                    f"head.kind: {backbone.config.name} has no distillation token; take a model that has one, such as "
                    "deit_tiny_distilled_patch16_224, or head.kind=linear"
                )
            self.second = self._linear(dim, classes)

    def _linear(self, dim: int, classes: int) -> nn.Linear:
        made = nn.Linear(dim, classes)
        nn.init.zeros_(made.weight)
        if self.config.init_std > 0:
            nn.init.trunc_normal_(made.weight, std=self.config.init_std)  # cut at -2 and 2, as MAE and timm do
        nn.init.constant_(made.bias, -math.log(classes) if self.config.bias == "prior" else 0.0)
        return made

    @property
    def layers(self) -> list[nn.Linear]:
        """Its linear layers: of the labels, and of the teacher where that has one of its own."""
        return [self.linear] if self.second is None else [self.linear, self.second]

    def forward(self, features: Features) -> Tensor:
        """Logits, fp32 [B, K]."""
        first, second = self.both(features)
        return first if self.second is None else (first + second) / 2

    def both(self, features: Features) -> tuple[Tensor, Tensor]:
        """Logits for the labels and for a teacher, fp32 [B, K] each: those of two tokens, or the same twice."""
        if self.second is not None:
            assert features.prefix is not None
            label, teacher = features.prefix[:, 0], features.prefix[:, 1]
            return self.linear(self.drop(label)).float(), self.second(self.drop(teacher)).float()
        x = features.pooled if self.pool is None else self.pool(features.spatial)
        logits = self.linear(self.drop(self.norm(x))).float()
        return logits, logits

    def folded(self) -> tuple[Tensor, Tensor] | None:
        """Weight [K, D] and bias [K] of what the head is in eval mode: a linear map of pooled features, or None.

        Of a distilled head, those of its first layer; the second is as it is.
        """
        weight, bias = self.linear.weight.detach().double(), self.linear.bias.detach().double()
        if self.pool is not None or self.config.norm == "layer":
            return None
        if isinstance(self.norm, BatchNorm):
            assert self.norm.running_mean is not None and self.norm.running_var is not None
            weight = weight * (self.norm.running_var.double() + self.norm.eps).rsqrt()
            bias = bias - weight @ self.norm.running_mean.double()
        return weight.float(), bias.float()


class AttentionPool(nn.Module):
    """One learned query attends to all positions, then an MLP: [B, L, D] or [B, D, h, w] to [B, D].

    The attentive probe of V-JEPA (Bardes et al. 2024) with one block; timm's latent attention behind a norm.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        from timm.layers import AttentionPoolLatent

        if dim % heads:
            raise InputError(f"head.heads: {heads} heads do not divide the {dim} channels of the spatial features")
        self.norm = nn.LayerNorm(dim, eps=PROBE_EPS)
        self.attend = AttentionPoolLatent(dim, num_heads=heads, norm_layer=nn.LayerNorm)

    def forward(self, spatial: Tensor) -> Tensor:
        tokens = spatial if spatial.ndim == 3 else spatial.flatten(2).transpose(1, 2)
        return self.attend(self.norm(tokens))


@torch.no_grad()
def set_linear(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Fill a linear layer: weight [K, D], bias [K]."""
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
