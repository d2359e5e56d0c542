"""Batch normalisation over the samples of all ranks, exact on CPU (gloo) and CUDA (nccl).

torch's SyncBatchNorm refuses CPU tensors and counts slots that hold no sample; this one does neither.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from penstock import distributed


def _many() -> bool:
    return distributed.started() and dist.get_world_size() > 1


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


def _global_statistics(local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean [C] and biased variance [C] over all ranks, by the parallel formula of Chan et al. (1979)."""
    parts = local[None]
    if _many():
        buckets = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(buckets, local)
        parts = torch.stack(buckets)
    counts, means, squares = parts[:, :1], *parts[:, 1:].chunk(2, dim=1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count.clamp(min=1)
    var = (squares + counts * (means - mean).square()).sum(0) / count.clamp(min=1)
    return count, mean, var


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, statistics over the valid rows of all ranks, in at least fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, valid: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        count, mean, var = _global_statistics(_local_statistics(x.to(wide), valid))
        ctx.save_for_backward(x, weight, mean, var, count, valid)
        ctx.eps, ctx.bias_dtype = eps, None if bias is None else bias.dtype
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
        # The statistics depend on the valid rows of every rank, so those rows also carry the other ranks' gradients.
        total_weight, total_bias = distributed.all_sum(torch.stack([grad_weight, grad_bias]))
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
        )


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm for [B, C, ...] whose statistics cover every rank's valid samples (see `set_valid`).

    Equals torch's BatchNorm in one process on the concatenated batch: output, gradients and running statistics.
    Statistics are fp32 whatever autocast makes of the input; the output keeps the input's dtype.

    Args:
        bias: whether a learned shift follows the scale.
        drop, act: applied to the output; timm's BatchNormAct2d holds them under these names.
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
        self.valid: Tensor | None = None  # bool [B]; None when every row counts

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected [B, {self.num_features}, ...], got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if self.training and (_many() or self.valid is not None):
            self._check_input_dim(input)
            y = self._synchronised(input)
        else:
            y = super().forward(input)
        return self.act(self.drop(y))

    @torch.compiler.disable  # collectives inside an autograd function
    def _synchronised(self, x: Tensor) -> Tensor:
        valid = self.valid
        if valid is not None and len(valid) != len(x):
            valid = valid.repeat(len(x) // len(valid))  # several views, concatenated
        y, count, mean, var = _Normalize.apply(x, self.weight, self.bias, valid, self.eps)
        self._update_running(x, count, mean, var, valid)
        return y

    @torch.no_grad()
    def _update_running(self, x: Tensor, count: Tensor, mean: Tensor, var: Tensor, valid: Tensor | None) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        weight = share * (count > 0).to(self.running_mean.dtype)  # no sample anywhere: the statistics stay
        unbiased = var * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)


def convert(module: nn.Module) -> nn.Module:
    """`module` with every BatchNorm (torch's, and timm's BatchNormAct2d) replaced by a SyncBatchNorm.

    Parameters, buffers and their names stay the same objects. Returns a new module when `module` itself is one.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, SyncBatchNorm):
        synced = SyncBatchNorm(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            drop=getattr(module, "drop", None),
            act=getattr(module, "act", None),
        )
        for name in ("weight", "bias"):
            synced.register_parameter(name, getattr(module, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            synced.register_buffer(name, getattr(module, name))
        return synced.train(module.training)
    for name, child in module.named_children():
        replacement = convert(child)
        if replacement is not child:
            setattr(module, name, replacement)
    return module


def set_valid(module: nn.Module, weights: Tensor | None) -> None:
    """Tell every SyncBatchNorm in `module` which samples of the coming forward count (weights [B] > 0).

    It holds until the next call, so that activation checkpointing recomputes the same statistics in backward.
    """
    valid = None if weights is None or bool((weights > 0).all()) else weights > 0
    for layer in module.modules():
        if isinstance(layer, SyncBatchNorm):
            layer.valid = valid
