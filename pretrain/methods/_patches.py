"""Images as sequences of patches, in the order of MAE: rows of patches, and inside a patch (row, column, channel)."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """[B, C, H, W] to [B, L, p * q * C], of the same type."""
    B, C, H, W = images.shape
    p, q = patch
    grid = images.reshape(B, C, H // p, p, W // q, q)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // q), p * q * C)


def unpatchify(patches: Tensor, patch: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The inverse of `patchify` for images of `size` (height, width)."""
    (p, q), (H, W) = patch, size
    grid = patches.reshape(len(patches), H // p, W // q, p, q, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, H, W)


def take(values: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` [B, K] of each sample of [B, L, D]: [B, K, D]. Copies whole rows, faster than `gather`."""
    B, L, D = values.shape
    rows = indices + torch.arange(0, B * L, L, device=indices.device)[:, None]
    return values.reshape(B * L, D).index_select(0, rows.flatten()).view(B, -1, D)


class PatchConv(nn.Conv2d):
    """A patch projection that also takes patches cut out already, [..., p * q * C] to [..., D].

    Its weight keeps the shape [D, C, p, q] and the name that checkpoints know. A module of its own, called as one,
    so that a sharded weight (ZeRO 3) is whole while it is used.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 4:
            return super().forward(input)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(input.to(weight.dtype), weight, self.bias)


def with_patch_input(conv: nn.Conv2d) -> PatchConv:
    """The same projection, sharing its parameters."""
    made = PatchConv(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, device="meta")  # type: ignore[arg-type]
    made.weight, made.bias = conv.weight, conv.bias
    return made


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine embedding of a grid (rows, columns), fp32 [rows * columns, dim].

    The quarters of a row are sin and cos of the column, then sin and cos of the row (MAE; the paper's section 3 and
    its released weights), with frequencies 10000^(-4 i / dim).
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine embedding needs a width that 4 divides, not {dim}")
    frequencies = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]
    parts: list[Any] = [function(angle) for angle in angles for function in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(parts, axis=1)).float()


def resample_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Embeddings [L, D] of a grid at another resolution, as timm resamples them; the same tensor when sizes agree."""
    if old == new:
        return positions
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(positions[None], list(new), list(old), num_prefix_tokens=0)[0]
