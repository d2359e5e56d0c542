"""Batch normalisation over the samples of all ranks, of each rank, or frozen; exact on CPU (gloo) and CUDA (nccl).

torch's SyncBatchNorm refuses CPU tensors and counts slots that hold no sample; this one does neither.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from penstock import distributed
from penstock.recipe import Block

Mode = Literal["sync", "local", "frozen"]


def _many() -> bool:
    return distributed.started() and dist.get_world_size() > 1


def _recomputing() -> bool:
    """In a backward pass: activation checkpointing runs a forward again, whose batch was counted before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _to(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else values.to(dtype)


def _local_statistics(x: Tensor, valid: Tensor | None) -> Tensor:
    """Count, mean [C] and sum of squared deviations [C] of this rank's valid rows, as one vector [1 + 2C]."""
    rows = x if valid is None else x[valid]
    count = rows.numel() // rows.shape[1]
    if count == 0:
        return rows.new_zeros(1 + 2 * x.shape[1])
    mean, var = torch.batch_norm_update_stats(rows, None, None, 0.0)
    return torch.cat([var.new_tensor([count]), mean, var * count])


def _stacked(values: Tensor) -> Tensor:
    """Every rank's `values`, [world, ...]."""
    return distributed.gather(values.detach()[None])


def _pooled(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean [C] and biased variance [C] over parts [P, 1 + 2C], by the formula of Chan et al. (1979)."""
    counts, means, squares = parts[:, :1], *parts[:, 1:].chunk(2, dim=1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count.clamp(min=1)
    var = (squares + counts * (means - mean).square()).sum(0) / count.clamp(min=1)
    return count, mean, var


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, statistics over the valid rows, in at least fp32.

    The rows are those of all ranks, or with `sync` False of this one.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, valid: Tensor | None, eps: float, sync: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        local = _local_statistics(x.to(wide), valid)
        count, mean, var = _pooled(_stacked(local) if sync else local[None])
        ctx.save_for_backward(x, weight, mean, var, count, valid)
        ctx.eps, ctx.sync, ctx.bias_dtype = eps, sync, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(count, mean, var)
        y = F.batch_norm(x.to(wide), mean, var, _to(weight, wide), _to(bias, wide), False, 0.0, eps)
        return y.to(x.dtype), count, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count, valid = ctx.saved_tensors
        wide = mean.dtype
        rows, scale = x.to(wide), torch.ones_like(mean) if weight is None else weight.to(wide)
        # As though the statistics were constants: the gradient of x, and sums over this rank's rows.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad_y.to(wide), rows, scale, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        # Statistics over the valid rows of every rank: those rows also carry the other ranks' gradients.
        totals = torch.stack([grad_weight, grad_bias])
        total_weight, total_bias = distributed.all_sum(totals) if ctx.sync else totals
        share = scale * torch.rsqrt(var + ctx.eps) / count.clamp(min=1)
        through = F.batch_norm(rows, mean, var, share * total_weight, share * total_bias, False, 0.0, ctx.eps)
        if valid is not None:
            through *= valid.to(wide).view(-1, *[1] * (x.ndim - 1))
        return (
            grad_x.sub_(through).to(x.dtype),
            None if weight is None else grad_weight.to(weight.dtype),
            None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype),
            None,
            None,
            None,
        )


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm for [B, C, ...] whose statistics cover valid samples alone (see `set_valid`).

    With mode `sync` they cover every rank, and it equals torch's BatchNorm in one process on the concatenated batch:
    output, gradients and running statistics. With `local` they are the rank's own (see `average_statistics`), with
    `frozen` the running statistics normalise in training, too, and never move. Statistics are fp32 whatever autocast
    makes of the input or the engine of the weights; the output keeps the input's dtype.

    Args:
        bias: whether a learned shift follows the scale.
        drop, act: applied to the output; timm's BatchNormAct2d holds them under these names.

    Attributes:
        batch_mean, batch_samples: fp32 [C] mean and size of the last batch trained on, slots of weight 0 included.
        observe: told count, mean [C] and biased variance [C] of each batch while `valid` is set; for recalibration.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        bias: bool = True,
        drop: nn.Module | None = None,
        act: nn.Module | None = None,
    ):
        super().__init__(num_features, eps, momentum, affine)
        if not bias:
            self.register_parameter("bias", None)
        self.drop, self.act = drop or nn.Identity(), act or nn.Identity()
        self.mode: Mode = "sync"
        self.valid: Tensor | None = None  # bool [B]; None when every row counts
        self.batch_mean: Tensor | None = None
        self.batch_samples = 0
        self.observe: Callable[[Tensor, Tensor, Tensor], None] | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected [B, {self.num_features}, ...], got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if self.running_mean is not None and (not self.training or self.mode == "frozen"):
            wide = self.running_mean.dtype
            weight, bias = _to(self.weight, wide), _to(self.bias, wide)
            y = F.batch_norm(input, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        elif self.training and (self.valid is not None or (self.mode == "sync" and _many())):
            y = self._over_valid(input)
        else:
            y = self._over_all(input)
        return self.act(self.drop(y))

    def _over_all(self, x: Tensor) -> Tensor:
        """One process, or one of many on its own, and every row counts: torch's kernel does it all."""
        if x.numel() == x.shape[1]:
            raise ValueError(f"batch statistics need more than one value per channel, got {list(x.shape)}")
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = _to(self.weight, wide), _to(self.bias, wide)
        mean, var = (self.running_mean, self.running_var) if self.training else (None, None)
        share = 0.0 if mean is None or _recomputing() else self._share(1)
        y, batch_mean, _ = torch.native_batch_norm(x, weight, bias, mean, var, True, share, self.eps)
        if self.training:
            self.batch_mean, self.batch_samples = batch_mean.detach(), len(x)
        return y

    @_disable_dynamo  # collectives in an autograd function; torch.compiler.disable takes a second and a half to import
    def _over_valid(self, x: Tensor) -> Tensor:
        valid, sync = self.valid, self.mode == "sync" and _many()
        if valid is not None and len(valid) != len(x):
            valid = valid.repeat(len(x) // len(valid))  # several views, concatenated
        y, count, mean, var = _Normalize.apply(x, self.weight, self.bias, valid, self.eps, sync)
        self._update_running(count, mean, var)
        self.batch_mean, self.batch_samples = mean, len(x) * (dist.get_world_size() if sync else 1)
        if self.observe is not None:
            self.observe(count, mean, var)
        return y

    def _share(self, counted: Tensor | int) -> float:
        """The new batch's part in the running statistics; `counted` is 1, or 0 when no value was valid."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(counted)
        if self.momentum is None:  # a plain average over batches
            return 1.0 / max(float(self.num_batches_tracked or 0), 1.0)
        return self.momentum

    @torch.no_grad()
    def _update_running(self, count: Tensor, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or _recomputing():
            return
        counted = (count > 0).long()
        weight = self._share(counted) * counted.to(self.running_mean.dtype)  # no sample: the statistics stay
        unbiased = var * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)


class BatchNorms:
    """The batch normalisation of a model, as a recipe's `batchnorm` block wants it."""

    class Config(Block):
        mode: Mode = Field(
            "sync", description="statistics over all ranks, of each rank (averaged to evaluate), or never moving"
        )
        affine: bool = Field(True, description="with mode: frozen, whether scale and shift are still trained")
        momentum: float | None = Field(
            None, gt=0, le=1, description="a batch's part in the running statistics; null keeps the model's"
        )
        recalibrate: int | None = Field(
            None,
            ge=0,
            description="samples over which statistics are computed anew before measuring and at the end; 0 leaves "
            "them; null does it where weights are averaged or sizes change",
        )

        @model_validator(mode="after")
        def _sound(self) -> "BatchNorms.Config":
            if self.mode != "frozen" and not self.affine:
                raise ValueError("affine: false goes with mode: frozen; set one of the two")
            for key in ("momentum", "recalibrate"):
                if self.mode == "frozen" and getattr(self, key):
                    raise ValueError(f"{key}: frozen statistics never move; leave it out, or set mode: sync")
            return self

    def __init__(self, config: "BatchNorms.Config"):
        self.config = config

    def apply(self, model: nn.Module) -> nn.Module:
        """`model` with its batch normalisation converted and set; call it before the optimizer is made."""
        model = convert(model)
        for layer in layers_of(model).values():
            layer.mode = self.config.mode
            layer.momentum = self.config.momentum or layer.momentum
            if self.config.mode == "frozen" and not self.config.affine:
                layer.requires_grad_(False)
        return model


def layers_of(module: nn.Module) -> dict[str, BatchNorm]:
    """The module's BatchNorm layers by name; those that `convert` has not made ours are not among them."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BatchNorm)}


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """Make the running statistics of every `local` layer those of all ranks' samples together, the same everywhere.

    The variance of the mixture is the mean of the ranks' variances plus the variance of their means. To be called by
    every rank before evaluations, checkpoints and exports: training does not depend on running statistics, and what a
    rank gathers afterwards is averaged in turn.
    """
    buffers = [
        (layer.running_mean, layer.running_var)
        for layer in layers_of(module).values()
        if layer.mode == "local" and layer.running_mean is not None and layer.running_var is not None
    ]
    if not buffers or not _many():
        return
    means, variances = (_stacked(torch.cat(each).double()) for each in zip(*buffers, strict=True))
    mean = means.mean(0)
    var = variances.mean(0) + (means - mean).square().mean(0)
    sizes = [len(running_mean) for running_mean, _ in buffers]
    for (running_mean, running_var), m, v in zip(buffers, mean.split(sizes), var.split(sizes), strict=True):
        running_mean.copy_(m)
        running_var.copy_(v)


def convert(module: nn.Module) -> nn.Module:
    """`module` with every BatchNorm (torch's, and timm's BatchNormAct2d) replaced by ours, in mode `sync`.

    Parameters, buffers and their names stay the same objects. Returns a new module when `module` itself is one.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, BatchNorm):
        ours = BatchNorm(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            drop=getattr(module, "drop", None),
            act=getattr(module, "act", None),
        )
        for name in ("weight", "bias"):
            ours.register_parameter(name, getattr(module, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            ours.register_buffer(name, getattr(module, name))
        return ours.train(module.training)
    for name, child in module.named_children():
        replacement = convert(child)
        if replacement is not child:
            setattr(module, name, replacement)
    return module


def set_valid(module: nn.Module, weights: Tensor | None) -> None:
    """Tell every BatchNorm in `module` which samples of the coming forward count (weights [B] > 0).

    It holds until the next call, so that activation checkpointing recomputes the same statistics in backward.
    """
    layers = layers_of(module).values()
    if not layers:  # to look at the weights would make a GPU wait
        return
    valid = None if weights is None or bool((weights > 0).all()) else weights > 0
    for layer in layers:
        layer.valid = valid
