"""What masked pretraining changes in a timm VisionTransformer, leaving the names of its weights as they are."""

from typing import Any

import torch
from torch import Tensor, nn

from penstock.backbones import Backbone
from penstock.errors import InputError
from pretrain.methods._patches import sincos_positions, with_patch_input

NO_VIT = (
    "method mae needs a timm VisionTransformer, and {name} is a {kind}; "
    "choose a backbone such as vit_small_patch16_224, or method=simclr"
)


def prepare(backbone: Backbone) -> Any:
    """The backbone's VisionTransformer, ready for patches: fixed positions, the paper's initial weights.

    A backbone that was given weights keeps them, and its position embedding with them.
    """
    vit = _checked(backbone)
    grid = vit.patch_embed.grid_size
    positions = vit.pos_embed.detach()
    if backbone.config.weights is None:
        prefix = positions.shape[1] - grid[0] * grid[1]
        positions = torch.cat([torch.zeros(prefix, vit.embed_dim), sincos_positions(vit.embed_dim, grid)])[None]
    _fix_positions(vit, positions)
    vit.patch_embed.proj = with_patch_input(vit.patch_embed.proj)
    if backbone.config.weights is None:
        initialize(vit)
    return vit


def initialize(module: nn.Module) -> None:
    """Initial weights of the paper's appendix A: Xavier for linear layers, normal(0.02) for tokens."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d):  # a patch projection is a linear layer on the flattened patch
            nn.init.xavier_uniform_(part.weight.view(len(part.weight), -1))
    for name in ("cls_token", "reg_token", "mask_token"):
        token = getattr(module, name, None)
        if token is not None:
            nn.init.normal_(token, std=0.02)


def _checked(backbone: Backbone) -> Any:
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    vit, name = backbone.model, backbone.config.name
    if type(vit) is not VisionTransformer:
        raise InputError(NO_VIT.format(name=name, kind=type(vit).__name__))
    reasons = {
        "cuts patches in a way of its own": type(vit.patch_embed) is not PatchEmbed,
        "has no position embedding": vit.pos_embed is None,
        "drops patches by itself (patch_drop_rate)": not isinstance(vit.patch_drop, nn.Identity),
        "sees an image as a single patch": vit.patch_embed.num_patches < 2,
        "has a width that 4 does not divide": vit.embed_dim % 4 != 0,
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"method mae cannot use {name} with these options: it {reason}")
    return vit


def _fix_positions(vit: Any, positions: Tensor) -> None:
    """Turn timm's position parameter into a buffer of the same name: fixed, and kept in fp32 by the engine."""
    del vit.pos_embed
    vit.register_buffer("pos_embed", positions.clone())

    def back_to_weights(module: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
        return tokens.to(vit.patch_embed.proj.weight.dtype)

    # timm adds the embedding just before this module. In pure bf16 the sum is fp32 and must become bf16 again.
    vit.pos_drop.register_forward_hook(back_to_weights)
