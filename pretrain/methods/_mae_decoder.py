"""The decoder of MAE: a narrow transformer that sees the encoded patches and a mask token for each hidden one."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from penstock.backbones.attention import choose_attention
from pretrain.methods._patches import resample_positions, sincos_positions


class Decoder(nn.Module):
    """Predicts hidden patches (He et al. 2022, section 3)."""

    positions: Tensor

    def __init__(self, width: int, dim: int, depth: int, heads: int, outputs: int, grid: tuple[int, int]):
        from timm.models.vision_transformer import Block, LayerNorm

        super().__init__()
        self.grid = grid
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, grid), persistent=False)
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)
        )
        choose_attention(self.blocks, grid[0] * grid[1])
        self.norm = LayerNorm(dim)
        self.pred = nn.Linear(dim, outputs)

    def no_weight_decay(self) -> set[str]:
        return {"mask_token"}

    def forward(
        self, latent: Tensor, order: Tensor, hidden: int, grid: tuple[int, int], recompute: bool = False
    ) -> Tensor:
        """Predictions for the hidden patches, [B, hidden, outputs], in the order they have in `order`.

        Attention does not know the order of its tokens, so they stay in the order of the mask and each is given the
        embedding of its true place; the reference moves the tokens back into place instead. Same result.

        Args:
            latent: [B, prefix + L - hidden, width], class and register tokens first, then the visible patches.
            order: int64 [B, L], places of all patches, visible ones first, the hidden ones last.
            grid: rows and columns of patches in the image.
            recompute: activations in the backward pass, to save memory.
        """
        x = self.embed(latent)
        x = torch.cat([x, self.mask_token.expand(len(x), hidden, -1)], dim=1)
        prefix = x.shape[1] - order.shape[1]
        table = F.pad(
            resample_positions(self.positions, self.grid, grid), (0, 0, 1, 0)
        )  # row 0, zeros, is the prefix's
        x = (x + F.embedding(F.pad(order + 1, (prefix, 0)), table)).to(x.dtype)
        last: Any = self.blocks[-1]
        for block in self.blocks[:-1]:
            if recompute and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        # Nobody reads the other tokens after the last attention, so its MLP, the norm and the head leave them out.
        x = (x + last.attn(last.norm1(x)))[:, -hidden:]
        x = x + last.mlp(last.norm2(x))
        return self.pred(self.norm(x))
