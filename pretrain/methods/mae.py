"""Masked autoencoders (He et al. 2022): hide most patches of an image, encode the rest, predict the hidden pixels."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from penstock import keyed
from penstock.backbones import Backbone, names
from penstock.errors import InputError
from penstock.recipe import Block
from penstock.schedule import Clock, Knob, trace
from penstock.streams.batch import Batch
from penstock.task import StepOutput, Task, weighted_mean
from pretrain.methods._mae_decoder import Decoder
from pretrain.methods._mae_encoder import NO_VIT, initialize, prepare
from pretrain.methods._mae_pictures import sheet, visible_statistics
from pretrain.methods._patches import patchify, resample_positions, take, unpatchify

PICTURES = 6  # images on a sheet
MASKS = 0x4D4145  # the stream of random numbers that masks come from
TARGET_EPS = 1e-6  # inside the root, as in the released code


class Reconstruction(NamedTuple):
    """B images with K visible and M hidden patches, K + M = L."""

    losses: Tensor  # fp32 [B], mean over a sample's hidden patches
    pred: Tensor  # [B, M, p * q * C], the hidden patches in the order of `order`
    order: Tensor  # int64 [B, L], places of patches: K visible, then M hidden


def visible_patches(patches: int, mask_ratio: float) -> int:
    """How many of an image's patches stay visible, at least one of each kind: 49 of 196 at a ratio of 0.75."""
    return min(max(int(patches * (1 - mask_ratio)), 1), patches - 1)


class _Core(nn.Module):
    """A step from images to losses as one graph for torch.compile. It owns nothing: the task sits in a tuple."""

    def __init__(self, task: "MAE"):
        super().__init__()
        self.task = (task,)

    def forward(self, images: Tensor, noise: Tensor, kept: int) -> Reconstruction:
        return self.task[0].reconstruct_from(images, noise, kept)


class MAE(Task):
    """Masked pretraining of a timm VisionTransformer, exact: same weights and noise, same loss as the released code.

    Only visible patches pass the encoder, only hidden ones pass the decoder's head. Images may be of any shape that the
    patch divides; at another size than the backbone's, position embeddings are resampled.
    """

    class Config(Block):
        name: Literal["mae"] = "mae"
        mask_ratio: Knob = Field(0.75, description="share of patches hidden, between 0 and 1")
        decoder_dim: int = Field(512, ge=4, multiple_of=4, description="width of the decoder")
        decoder_depth: int = Field(8, ge=1, description="blocks of the decoder")
        decoder_heads: int = Field(16, ge=1, description="attention heads of the decoder")
        norm_pix: bool = Field(True, description="predict each patch less its own mean, over its standard deviation")

        @field_validator("mask_ratio")
        @classmethod
        def _share(cls, ratio: Any) -> Any:
            values = [value for _, value in trace({"": ratio}, Clock(total=1000, batch=1, epoch=100))[""]]
            if not (min(values) > 0 and max(values) < 1):
                raise ValueError(
                    f"the share of hidden patches must stay between 0 and 1, not reach {min(values)} or {max(values)}"
                )
            return ratio

        @field_validator("decoder_heads")
        @classmethod
        def _divides(cls, heads: int, info: Any) -> int:
            dim = info.data.get("decoder_dim", heads)
            if dim % heads:
                raise ValueError(f"{heads} heads do not divide decoder_dim {dim}")
            return heads

    @classmethod
    def conflicts(cls, recipe: Any) -> list[str]:
        """Found from names alone; building the backbone finds the rarer reasons."""
        name = recipe.backbone.name
        if names.is_vit(name):
            return []
        kind = names.facts(name).kind or "model of another kind"
        return [f"backbone.name: {NO_VIT.format(name=name, kind=kind)}"]

    def __init__(self, config: "MAE.Config", backbone: Backbone, seed: int):
        super().__init__()
        self.config, self.backbone, self.seed = config, backbone, seed
        vit = prepare(backbone)
        self.patch: tuple[int, int] = vit.patch_embed.patch_size
        self.grid = self.grid_of(backbone.size)
        values = self.patch[0] * self.patch[1] * backbone.config.channels
        self.decoder = Decoder(
            vit.embed_dim, config.decoder_dim, config.decoder_depth, config.decoder_heads, values, self.grid
        )
        initialize(self.decoder)
        self.core = _Core(self)
        # A network that predicts 0 has the mean square of the target as its loss; the variance is unbiased.
        self.collapse_loss = 1 - 1 / values if config.norm_pix else None

    def forward(self, batch: Batch, knobs: Mapping[str, float]) -> StepOutput:
        images = batch.views[0]
        rows, columns = self.grid_of(images.shape[-2:])
        noise = keyed.uniform(self.seed, MASKS, batch.positions, rows * columns)
        losses = self.core(images, noise, visible_patches(rows * columns, knobs["mask_ratio"])).losses
        return StepOutput(weighted_mean(losses, batch.weights), batch.weights.sum())

    def compiled_parts(self) -> list[nn.Module]:
        return [self.core]  # evaluations call the backbone with other shapes, and it stays as it is

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """A sheet: original, masked, and the reconstruction of hidden patches pasted between the visible ones.

        With `norm_pix` a prediction lacks the patch's mean and standard deviation. They are taken from the original
        ("true statistics", which flatters), and guessed from visible patches alone ("visible statistics").
        """
        images = self.backbone.normalize(batch.views[0][:PICTURES])
        size = (images.shape[-2], images.shape[-1])
        grid = self.grid_of(size)
        noise = keyed.uniform(self.seed, MASKS, batch.positions[:PICTURES], grid[0] * grid[1])
        training = self.training
        ratio = self.config.mask_ratio
        result = self.eval().reconstruct(images, noise, ratio if isinstance(ratio, float) else ratio.start)
        self.train(training)
        patches, pred = patchify(images, self.patch), result.pred.float()
        kept = patches.shape[1] - pred.shape[1]

        def paste(hidden: Tensor) -> Tensor:
            places = result.order[:, kept:, None].expand(-1, -1, patches.shape[-1])
            pasted = unpatchify(patches.scatter(1, places, hidden.expand_as(pred)), self.patch, size)
            return pasted * self.backbone.std[:, None, None] + self.backbone.mean[:, None, None]

        grey = torch.zeros_like(pred)  # the mean colour
        columns = {"original": paste(take(patches, result.order[:, kept:])), "masked": paste(grey)}
        if self.config.norm_pix:
            std, mean = torch.std_mean(take(patches, result.order[:, kept:]), dim=-1, keepdim=True)
            columns["true statistics"] = paste(pred * std + mean)
            mean, std = visible_statistics(patches, result.order, kept, grid)
            columns["visible statistics"] = paste(pred * std + mean)
        else:
            columns["reconstruction"] = paste(pred)
        return {"reconstruction": sheet(columns)}

    def reconstruct(self, images: Tensor, noise: Tensor, mask_ratio: float) -> Reconstruction:
        """Predict the patches that the noise hides.

        Args:
            images: uint8, or float and normalised, [B, C, H, W].
            noise: [B, L]; the int(L * (1 - mask_ratio)) patches with the least noise stay visible.
        """
        return self.reconstruct_from(images, noise, visible_patches(noise.shape[1], mask_ratio))

    def reconstruct_from(self, images: Tensor, noise: Tensor, kept: int) -> Reconstruction:
        """`reconstruct` with the number of visible patches."""
        grid = self.grid_of(images.shape[-2:])
        order = noise.argsort(dim=1, stable=True)
        patches = patchify(images, self.patch)
        visible, hidden = order[:, :kept], order[:, kept:]
        latent = self.encode(self._normalize(take(patches, visible)), visible, grid)
        pred = self.decoder(
            latent, order, order.shape[1] - kept, grid, recompute=self.backbone.model.grad_checkpointing
        )
        error = pred.float() - self._target(self._normalize(take(patches, hidden)))
        return Reconstruction(error.square().mean(dim=(1, 2)), pred, order)

    def encode(self, patches: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
        """The encoder on some patches of each image: [B, prefix + K, D], class and register tokens first.

        Args:
            patches: float and normalised, [B, K, p * q * C].
            places: int64 [B, K], where in the image they are.
        """
        vit: Any = self.backbone.model
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        positions = resample_positions(vit.pos_embed[0, prefix:], self.grid, grid)
        x = vit.patch_embed.norm(vit.patch_embed.proj(patches)) + positions[places]
        tokens = [token.expand(len(x), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
        if prefix:
            tokens = [torch.cat(tokens, dim=1) + vit.pos_embed[:, :prefix]]
        x = vit.norm_pre(vit.pos_drop(torch.cat([*tokens, x], dim=1)))
        if vit.grad_checkpointing and self.training:
            for block in vit.blocks:
                x = checkpoint(block, x, use_reentrant=False)
        else:
            x = vit.blocks(x)
        return vit.norm(x)

    def grid_of(self, size: Any) -> tuple[int, int]:
        """Rows and columns of patches in an image of `size` (height, width)."""
        (height, width), (p, q) = size, self.patch
        if height % p or width % q:
            raise InputError(
                f"the patch {p} x {q} does not divide images of {height} x {width}; "
                f"let the augmentation give {height // p * p} x {width // q * q}"
            )
        return height // p, width // q

    def _normalize(self, patches: Tensor) -> Tensor:
        """uint8 patches [B, K, p * q * C] to normalised fp32; float ones are normalised already."""
        if patches.dtype != torch.uint8:
            return patches
        pixels = patches.view(-1, self.backbone.config.channels, 1, 1)  # the channel is the last axis of a patch
        return self.backbone.normalize(pixels).view(patches.shape)

    def _target(self, patches: Tensor) -> Tensor:
        if not self.config.norm_pix:
            return patches
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # unbiased, as in the released code
        return (patches - mean) * (var + TARGET_EPS).rsqrt()
