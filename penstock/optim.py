"""Parameter groups by module type, and timm's optimizers by name. The learning rate is written by the engine, from
our own curves, at every step: nothing else schedules it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from pydantic import Field, model_validator
from torch import nn

from penstock.errors import InputError, nearest
from penstock.recipe import Block
from penstock.schedule import Cosine, Curve, Knob

# These look at whole parameters (trust ratios, factored moments), which ZeRO's flat partitions do not have.
NEEDS_SHAPES = ("lamb", "lars", "larc", "adafactor", "muon", "shampoo", "kron", "novograd", "adamp", "sgdp")
ADAM_LIKE = {"adam", "adamw"}
Kind = Literal["norm", "bias", "token", "position", "scale"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass
class Group:
    """Parameters that share a learning-rate scale, a weight-decay setting, and the time they begin to learn."""

    lr_scale: float
    decayed: bool
    opens: float = 0.0  # nominal time; before it neither gradient nor decay moves the weights
    anchored: bool = False  # pulled towards its starting weights by l2_sp, instead of decayed
    names: list[str] = field(default_factory=list)
    params: list[nn.Parameter] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The group as an optimizer takes it, without decay until `write` gives it some."""
        return dict(vars(self)) | {"weight_decay": 0.0, "l2_sp": 0.0, "cautious_decay": 0.0}


class Optim:
    """The optimizer of a recipe."""

    class Config(Block):
        name: str = Field("adamw", description="any timm optimizer")
        lr: float | None = Field(
            None,
            gt=0,
            description="peak learning rate whatever the batch; only base_lr grows with it (and batch_growth)",
        )
        base_lr: float | None = Field(None, gt=0, description="peak learning rate for a batch of `per`")
        per: int = Field(256, gt=0, description="the batch that base_lr is for")
        scaling: Literal["linear", "sqrt"] = Field("linear", description="how base_lr grows with the batch")
        schedule: Curve = Field(Cosine(), description="a curve over the run, as a fraction of the peak")
        weight_decay: Knob = Field(
            0.05,
            description="as the optimizer's name says: adamw, sgdw, lion, ... decay the weights (decoupled); adam, "
            "sgd, momentum, rmsprop, ... add it to the gradient (coupled)",
        )
        cautious_decay: bool = Field(
            False, description="decay, decoupled, only where the update shrinks the weight, too"
        )
        l2_sp: Knob = Field(
            0.0, description="decay of the backbone towards its starting weights, decoupled, instead of towards 0"
        )
        no_decay: tuple[Kind, ...] = Field(KINDS, description="kinds of parameters that are not decayed")
        betas: tuple[float, float] | None = Field(None, description="of Adam and its kin; null is the optimizer's own")
        eps: float | None = None
        momentum: Knob = Field(0.9, description="of SGD and its kin; a curve also leads the first of Adam's betas")
        layer_decay: float = Field(1.0, gt=0, le=1, description="factor on the rate per layer below the head")
        options: dict[str, Any] = Field(
            {}, description="further arguments of the optimizer, such as {caution: true} (Liang et al. 2024)"
        )

        @model_validator(mode="after")
        def _one_rate(self) -> "Optim.Config":
            if (self.lr is None) == (self.base_lr is None):
                raise ValueError(
                    "lr: give either lr (the peak rate) or base_lr (the rate for a batch of `per`), not both"
                )
            return self

        @property
        def needs_shapes(self) -> bool:
            """Whether the optimizer looks at whole parameters; cautious ones take a mean over each."""
            cautious = self.options.get("caution") or self.name.startswith("c")
            return bool(cautious) or any(part in self.name for part in NEEDS_SHAPES)

        @property
        def knobs(self) -> dict[str, Any]:
            """What follows a curve: numbers or curves by name. The schedule is a fraction of the peak rate."""
            found = {"lr": self.schedule, "weight_decay": self.weight_decay}
            if self.pulls:
                found["l2_sp"] = self.l2_sp
            if not isinstance(self.momentum, (int, float)):
                found["optim_momentum"] = self.momentum  # methods have a momentum of their own
            return found

        @property
        def pulls(self) -> bool:
            """Whether l2_sp is on."""
            return not (isinstance(self.l2_sp, (int, float)) and self.l2_sp == 0)

        def peak(self, batch: int) -> float:
            """The peak learning rate for a global batch (Goyal et al. 2017 for linear scaling)."""
            if self.lr is not None:
                return self.lr
            ratio = batch / self.per
            return float(self.base_lr or 0.0) * (ratio if self.scaling == "linear" else math.sqrt(ratio))

    def __init__(self, config: "Optim.Config"):
        self.config = config

    def build(self, module: nn.Module, batch: int, opens: Mapping[str, float] | None = None) -> torch.optim.Optimizer:
        """The optimizer over the trainable parameters of `module`; those named in `opens` learn from that time on."""
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
        anchored = "backbone." if config.pulls else None
        groups = parameter_groups(module, config.layer_decay, config.no_decay, opens or {}, anchored)
        dicts = [group.as_dict() | {"cautious": config.cautious_decay} for group in groups]
        momentum = config.momentum if isinstance(config.momentum, (int, float)) else config.momentum.start
        try:
            return create_optimizer_v2(
                dicts, opt=config.name, lr=config.peak(batch), weight_decay=0.0, momentum=momentum, **options
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"optim: {config.name} does not work with these options: {error}") from error


def kind_of(module: nn.Module, name: str) -> str:
    """What a module's own parameter `name` is for weight decay: norm, bias, token, position, scale or weight."""
    if isinstance(module, NORMS) or "norm" in type(module).__name__.lower():
        return "norm"
    if name.endswith(("bias", "biases")):  # attention_biases in LeViT and TinyViT
        return "bias"
    if "token" in name:
        return "token"
    if "pos_embed" in name or "position" in name:
        return "position"
    if name in ("gamma", "gamma_1", "gamma_2") or "scale" in name:
        return "scale"
    return "weight"


def parameter_groups(
    module: nn.Module,
    layer_decay: float = 1.0,
    no_decay: tuple[str, ...] = KINDS,
    opens: Mapping[str, float] | None = None,
    anchored: str | None = None,
) -> list[Group]:
    """Every trainable parameter of `module` in exactly one group; few groups, since ZeRO keeps a buffer for each.

    Args:
        opens: nominal time from which a parameter, by its full name, learns; 0 for those not named.
        anchored: parameters whose names begin so are pulled to their starting weights; None for none.
    """
    scales, opens = layer_scales(module, layer_decay), dict(opens or {})
    groups: dict[tuple, Group] = {}
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        for name, param in owner.named_parameters(recurse=False):
            if not param.requires_grad or id(param) in seen:
                continue
            seen.add(id(param))
            full = f"{prefix}.{name}" if prefix else name
            has_start = anchored is not None and full.startswith(anchored)
            place = (scales.get(full, 1.0), kind_of(owner, name) not in no_decay, opens.pop(full, 0.0), has_start)
            group = groups.setdefault(place, Group(*place))
            group.names.append(full)
            group.params.append(param)
    if not groups:
        raise InputError("no parameter is trainable; unfreeze some, or there is nothing to train")
    if opens:
        raise ValueError(f"these parameters are to open later, but are not trainable ones: {sorted(opens)[:5]}")
    return [groups[place] for place in sorted(groups, reverse=True)]


def write(groups: Iterable[dict[str, Any]], knobs: Mapping[str, float], now: float) -> None:
    """Write the rate, decays and momentum of nominal time `now` into an optimizer's groups."""
    for group in groups:
        open_ = now >= group["opens"]
        group["lr"] = knobs["lr"] * group["lr_scale"] if open_ else 0.0
        decay = knobs["weight_decay"] if open_ and group["decayed"] and not group["anchored"] else 0.0
        group["weight_decay"], group["cautious_decay"] = (0.0, decay) if group["cautious"] else (decay, 0.0)
        group["l2_sp"] = knobs["l2_sp"] if group["anchored"] else 0.0
        if "optim_momentum" in knobs:
            if "betas" in group:
                group["betas"] = (knobs["optim_momentum"], *group["betas"][1:])
            else:
                group["momentum"] = knobs["optim_momentum"]


def layer_scales(module: nn.Module, layer_decay: float) -> dict[str, float]:
    """`layer_decay` to the number of layers above, for the parameters of the backbone (Clark et al. 2020; BEiT)."""
    if layer_decay == 1.0:
        return {}
    backbone: Any = module.get_submodule("backbone.model")
    if not hasattr(backbone, "group_matcher"):
        raise InputError(f"optim.layer_decay: {type(backbone).__name__} has no layer order; set layer_decay to 1")
    layers, top = layer_numbers(backbone)
    return {f"backbone.model.{name}": layer_decay ** (top - layer) for name, layer in layers.items()}


def layer_numbers(backbone: Any) -> tuple[dict[str, int], int]:
    """The layer of each parameter of a timm model, 0 for the stem, and the layer of the head.

    They are timm's, except for the last norm of a ViT, which timm counts to the last block. As in BEiT and MAE it goes
    with the head, whether it comes before the pooling (`norm`) or after it (`fc_norm`).
    """
    from timm.models._manipulate import group_with_matcher

    head = "a head that no pattern matches"
    named = [(name, None) for name, _ in backbone.named_parameters()]
    layers: dict[str, int] = group_with_matcher(
        iter([*named, (head, None)]), backbone.group_matcher(coarse=False), reverse=True
    )
    top = max(layers.values())  # what no pattern matches is the head's, too
    layers.pop(head)
    if hasattr(backbone, "blocks") and hasattr(backbone, "patch_embed"):
        layers |= {name: top for name in layers if name.startswith(("norm.", "fc_norm."))}
    return layers, top
