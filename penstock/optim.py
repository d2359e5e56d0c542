"""Parameter groups by module type, and timm's optimizers by name. The learning rate is written by the engine, from
our own curves, at every step: nothing else schedules it."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from pydantic import Field, model_validator
from torch import nn

from penstock.errors import InputError, nearest
from penstock.recipe import Block
from penstock.schedule import Cosine, Curve, Knob

# These look at a parameter's shape (trust ratios, factored moments), which ZeRO's flat partitions do not have.
NEEDS_SHAPES = {
    "lars",
    "larc",
    "nlars",
    "nlarc",
    "lamb",
    "lambc",
    "lambw",
    "adafactor",
    "adafactorbv",
    "muon",
    "shampoo",
}
ADAM_LIKE = {"adam", "adamw"}
Kind = Literal["norm", "bias", "token", "position", "scale"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass
class Group:
    """Parameters that share a learning-rate scale and a weight-decay setting."""

    lr_scale: float
    decayed: bool
    names: list[str] = field(default_factory=list)
    params: list[nn.Parameter] = field(default_factory=list)


class Optim:
    """The optimizer of a recipe."""

    class Config(Block):
        name: str = Field("adamw", description="any timm optimizer")
        lr: float | None = Field(None, gt=0, description="peak learning rate; or give base_lr")
        base_lr: float | None = Field(None, gt=0, description="peak learning rate for a batch of `per`")
        per: int = Field(256, gt=0, description="the batch that base_lr is for")
        scaling: Literal["linear", "sqrt"] = Field("linear", description="how base_lr grows with the batch")
        schedule: Curve = Field(Cosine(), description="a curve over the run, as a fraction of the peak")
        weight_decay: Knob = 0.05
        no_decay: tuple[Kind, ...] = Field(KINDS, description="kinds of parameters that are not decayed")
        betas: tuple[float, float] | None = None
        eps: float | None = None
        momentum: float = 0.9
        layer_decay: float = Field(1.0, gt=0, le=1, description="factor on the rate per layer below the head")
        options: dict[str, Any] = Field({}, description="further keyword arguments of the optimizer")

        @model_validator(mode="after")
        def _one_rate(self) -> "Optim.Config":
            if (self.lr is None) == (self.base_lr is None):
                raise ValueError(
                    "lr: give either lr (the peak rate) or base_lr (the rate for a batch of `per`), not both"
                )
            return self

        def peak(self, batch: int) -> float:
            """The peak learning rate for a global batch (Goyal et al. 2017 for linear scaling)."""
            if self.lr is not None:
                return self.lr
            ratio = batch / self.per
            return float(self.base_lr or 0.0) * (ratio if self.scaling == "linear" else math.sqrt(ratio))

    def __init__(self, config: "Optim.Config"):
        self.config = config

    def build(self, module: nn.Module, batch: int) -> torch.optim.Optimizer:
        """The optimizer over the trainable parameters of `module`."""
        from timm.optim import create_optimizer_v2, list_optimizers

        config = self.config
        known = [str(name) for name in list_optimizers()]
        if config.name not in known:
            raise InputError(f"optim.name: no timm optimizer is called {config.name!r}{nearest(config.name, known)}")
        options = dict(config.options)
        if config.betas is not None:
            options["betas"] = config.betas
        if config.eps is not None:
            options["eps"] = config.eps
        if config.name in ADAM_LIKE:
            options.setdefault("fused", True)
        groups = [
            {"params": g.params, "names": g.names, "lr_scale": g.lr_scale, "decayed": g.decayed, "weight_decay": 0.0}
            for g in parameter_groups(module, config.layer_decay, config.no_decay)
        ]
        try:
            return create_optimizer_v2(
                groups, opt=config.name, lr=config.peak(batch), weight_decay=0.0, momentum=config.momentum, **options
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"optim: {config.name} does not work with these options: {error}") from error


def kind_of(module: nn.Module, name: str) -> str:
    """What a module's own parameter `name` is for weight decay: norm, bias, token, position, scale or weight."""
    if isinstance(module, NORMS) or "norm" in type(module).__name__.lower():
        return "norm"
    if name.endswith("bias"):
        return "bias"
    if "token" in name:
        return "token"
    if "pos_embed" in name or "position" in name:
        return "position"
    if name in ("gamma", "gamma_1", "gamma_2") or "scale" in name:
        return "scale"
    return "weight"


def parameter_groups(module: nn.Module, layer_decay: float = 1.0, no_decay: tuple[str, ...] = KINDS) -> list[Group]:
    """Every trainable parameter of `module` in exactly one group; few groups, since ZeRO keeps a buffer for each."""
    scales = layer_scales(module, layer_decay)
    groups: dict[tuple[float, bool], Group] = {}
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        for name, param in owner.named_parameters(recurse=False):
            if not param.requires_grad or id(param) in seen:
                continue
            seen.add(id(param))
            full = f"{prefix}.{name}" if prefix else name
            place = (scales.get(full, 1.0), kind_of(owner, name) not in no_decay)
            group = groups.setdefault(place, Group(*place))
            group.names.append(full)
            group.params.append(param)
    if not groups:
        raise InputError("no parameter is trainable; unfreeze some, or there is nothing to train")
    return [groups[place] for place in sorted(groups, reverse=True)]


def layer_scales(module: nn.Module, layer_decay: float) -> dict[str, float]:
    """`layer_decay` to the number of layers above, for the parameters of the backbone (Clark et al. 2020; BEiT)."""
    if layer_decay == 1.0:
        return {}
    from timm.models import group_parameters

    backbone: Any = module.get_submodule("backbone.model")
    if not hasattr(backbone, "group_matcher"):
        raise InputError(f"optim.layer_decay: {type(backbone).__name__} has no layer order; set layer_decay to 1")
    layers = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
    top = max(layers.values()) + 1  # the head, outside the backbone, has the full rate
    return {f"backbone.model.{name}": layer_decay ** (top - layer) for name, layer in layers.items()}
