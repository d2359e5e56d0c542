"""DeepSpeed behind a small interface; only files named engine know it.

What DeepSpeed gets silently wrong is settled here: it is given no scheduler and no clipping at stage 0, losses are
scaled once, buffers are broadcast, hyper-parameters are written at every step, a step that is not finite is skipped on
all ranks at every stage, and weights and optimizer state are read and written as plain fp32 tensors by name.
"""

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from penstock import distributed
from penstock.decay import Decay
from penstock.engine_settings import check_extra
from penstock.engine_start import import_deepspeed, start_ranks
from penstock.engine_state import Masters
from penstock.errors import InputError
from penstock.optim import write
from penstock.recipe import Block
from penstock.sam import Sam
from penstock.task import StepOutput, Task

__all__ = ["Engine", "Step", "settings", "start_ranks"]

Precision = Literal["fp32", "bf16", "bf16_pure", "fp16"]
BUCKET = 2**24  # gradients that stage 0 copies and reduces at once, 64 MB; DeepSpeed's own bucket holds 2 GB


@dataclass(frozen=True)
class Step:
    """What an optimizer step did: whether it was applied, and the gradient's norm before clipping."""

    applied: bool
    grad_norm: float
    stop: bool = False  # some rank was asked to stop


class Engine:
    """Runs a task under DeepSpeed.

    Args:
        task: the module; moved to this rank's device.
        optimizer: over the task's parameters, from penstock/optim.py, whose `write` its groups are made for.
        micro_batch: samples per rank and micro-step.
    """

    class Config(Block):
        zero: Literal[0, 1, 2, 3] = Field(0, description="ZeRO stage; 0 is fastest while the model fits")
        precision: Precision = Field(
            "bf16", description="bf16: fp32 weights, bf16 autocast; bf16_pure, fp16: cast weights"
        )
        accumulation: int = Field(1, ge=1, description="micro-batches per optimizer step")
        clip: float | None = Field(None, gt=0, description="threshold of clipping: the largest norm, value or ratio")
        clip_by: Literal["norm", "value", "agc"] = Field(
            "norm",
            description="norm of the whole gradient; each value; or agc, adaptive: the gradient's norm by unit of the "
            "backbone, as a share of the weights' (Brock et al. 2021; clip: 0.01)",
        )
        sam: Sam.Config | None = Field(None, description="sharpness-aware minimization, at twice the cost of a step")
        checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")
        compile: bool = Field(False, description="torch.compile the task's parts")
        max_skipped: int = Field(10, ge=1, description="steps in a row that may be skipped as not finite")
        deepspeed: dict[str, Any] = Field({}, description="further DeepSpeed settings, checked key by key")

        @field_validator("deepspeed")
        @classmethod
        def _known_settings(cls, extra: dict[str, Any]) -> dict[str, Any]:
            check_extra(extra)
            return extra

        @model_validator(mode="after")
        def _sound(self) -> "Engine.Config":
            if self.precision in ("bf16_pure", "fp16") and self.zero == 0:
                raise ValueError(
                    f"precision: {self.precision} with zero: 0 corrupts the weights at start "
                    "(DeepSpeed steps its optimizer on empty gradients); use zero: 1, or precision: bf16"
                )
            if self.compile and self.zero == 3:
                raise ValueError(
                    "compile: true with zero: 3 breaks at every gathered weight; use zero: 2 or compile: false"
                )
            if self.clip_by != "norm" and self.clip is None:
                raise ValueError(f"clip_by: {self.clip_by} needs a threshold; give clip, such as clip: 0.01")
            if self.clip_by != "norm" and self.zero > 0:
                raise ValueError(
                    f"clip_by: {self.clip_by} with zero: {self.zero}: DeepSpeed can only clip its cut-up gradients by "
                    "their norm; use zero: 0, or clip_by: norm"
                )
            if self.sam is not None and self.zero > 0:
                raise ValueError(
                    f"sam: with zero: {self.zero} no rank has the whole gradient that SAM climbs before the step "
                    "(fairscale #989); use zero: 0, or sam: null"
                )
            return self

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer, config: "Engine.Config", micro_batch: int):
        self.task, self.config = task, config
        self.accumulation, self.world = config.accumulation, distributed.world()
        self.device = distributed.device()
        _preflight(config, self.device)
        if config.checkpointing:
            _checkpoint_activations(task)
        deepspeed = import_deepspeed(self.device)
        self._ds, _, _, _ = deepspeed.initialize(
            model=task.to(self.device),
            optimizer=optimizer,
            config=settings(config, micro_batch),
            dist_init_required=False,
        )
        if config.zero == 0 and getattr(task.backbone, "kind", "") == "map":
            # A fifth to a third faster; DeepSpeed's broadcast, behind us, takes contiguous weights alone.
            task.to(memory_format=torch.channels_last)
        # At stage 0 we reduce, at the step: in small buckets, and not at all in a single process.
        self._ds.enable_backward_allreduce = config.zero > 0
        self._gathered = deepspeed.zero.GatheredParameters
        self.groups: list[dict[str, Any]] = self._ds.optimizer.param_groups
        self._micro_step = 0
        self._total: Tensor | None = None
        self._stop = torch.zeros(())
        self._now = math.inf
        self._broadcast_buffers()
        self._sam = Sam(config.sam) if config.sam is not None else None
        self._add_decays()
        if config.compile:
            for part in task.compiled_parts():
                part.compile()

    # One optimizer step ------------------------------------------------------------------------------------------

    def set(self, knobs: Mapping[str, float], now: float = math.inf) -> None:
        """Write this step's rate, decays and momentum into every group; those that open after `now` stay as they are.

        Args:
            now: nominal time before the step (`Tick.before`); by default every group is open.
        """
        write(self.groups, knobs, now)
        self._now = now

    def begin(self, valid: Tensor, stop: bool = False) -> None:
        """Start a step whose micro-batches on this rank hold `valid` samples of weight > 0 (a float scalar).

        One reduction tells all ranks both the samples of the step and whether any rank was asked to stop.
        """
        votes = distributed.all_sum(torch.stack([valid.float(), torch.tensor(float(stop))]).to(self.device))
        self._total, self._stop = votes[0].clamp(min=1), votes[1]
        self._micro_step = 0

    def sweeps(self, step: int) -> Iterator[int]:
        """How often the micro-batches of the step after `step` steps run forward and backward: once, or twice with SAM.

        Seed the random numbers before each sweep, so that both see the same dropout; metrics count in sweep 0 alone.
        """
        yield 0
        if self._sam is None or not self._sam.due(step):
            return
        self._reduce()
        buffers = [(buffer, buffer.clone()) for buffer in self.task.buffers()]
        params = self._open()
        if self._sam.climb(params):  # else the gradient is not finite, and step() skips it
            self._micro_step = 0
            yield 1
            self._sam.back(params)
            for buffer, before in buffers:  # running statistics belong to the weights that stay
                buffer.copy_(before)

    def forward(self, batch: Any, knobs: Mapping[str, float]) -> StepOutput:
        """The task on one micro-batch, under the recipe's precision."""
        self._ds.set_gradient_accumulation_boundary(self._micro_step == self.accumulation - 1)
        return self._ds(batch, knobs)

    def backward(self, output: StepOutput) -> None:
        """Add this micro-batch's share of the gradient of the mean over the whole global batch's valid samples."""
        if self._total is None:
            raise RuntimeError("engine.begin() starts a step, and each of its micro-batches has one backward")
        # DeepSpeed divides by the accumulation and averages over ranks; samples count the same wherever they are.
        loss = output.loss * (output.weight * (self.world * self.accumulation) / self._total)
        # A loss that is not finite makes every gradient NaN, on all ranks after the reduction, and the step is skipped.
        loss = loss * torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))
        self._ds.backward(loss)
        self._micro_step += 1

    def step(self) -> Step:
        """Apply the gradients, unless they are not finite on some rank: then no weight moves, on any rank."""
        if self._micro_step != self.accumulation:
            raise RuntimeError(f"{self._micro_step} backwards in a step of {self.accumulation} micro-batches")
        self._total = None
        if self.config.zero == 0:
            applied, norm = self._step_plain()
        else:
            self._ds.step()
            applied, norm = self._ds.was_step_applied(), float(self._ds.get_global_grad_norm() or 0.0)
        return Step(applied, norm, bool(self._stop > 0))

    def _step_plain(self) -> tuple[bool, float]:
        # At stage 0 DeepSpeed would let a NaN into the weights, and does not tell the norm it clips by.
        self._reduce()
        params = self._trained()
        norm = nn.utils.get_total_norm([param.grad for param in self._open() if param.grad is not None])
        value = float(norm)
        applied = math.isfinite(value)
        if applied:
            self._clip(params, norm)
            self._ds.step()
        else:
            self._ds.zero_grad()
        return applied, value

    def _trained(self) -> list[nn.Parameter]:
        return [param for param in self.task.parameters() if param.requires_grad]

    def _open(self) -> list[nn.Parameter]:
        """The parameters that this step moves, at stage 0: what has not opened yet takes no part in norms."""
        open_now = {id(p) for group in self.groups if group["opens"] <= self._now for p in group["params"]}
        return [param for param in self._trained() if id(param) in open_now]

    def _reduce(self) -> None:
        """Average the gradients over the ranks, at stage 0. To do it twice changes nothing."""
        for param in self._trained():
            if param.grad is None:  # it decays all the same, as at the other stages
                param.grad = torch.zeros_like(param)
        if self.world > 1:
            self._ds.buffered_allreduce_fallback(elements_per_buffer=BUCKET)

    def _clip(self, params: list[nn.Parameter], norm: Tensor) -> None:
        clip = self.config.clip
        if clip is None:
            return
        if self.config.clip_by == "norm":
            nn.utils.clip_grads_with_norm_(params, clip, norm)
        elif self.config.clip_by == "value":
            nn.utils.clip_grad_value_(params, clip)
        else:
            from timm.utils import adaptive_clip_grad

            # The paper leaves the head alone. Here it is what is no part of the backbone.
            adaptive_clip_grad([param for param in self.task.backbone.parameters() if param.requires_grad], clip)

    # Evaluation ---------------------------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager:
        """The recipe's precision, for what runs beside training: evaluations, pictures."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    # Weights and optimizer state by name --------------------------------------------------------------------------

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Weights in fp32 and buffers whose names begin with `prefix`, on the CPU, the same on every rank.

        Collective: every rank calls it. At ZeRO-3 the weights are gathered one by one.
        """
        found: dict[str, Tensor] = {}
        masters = self.masters()
        for name, param in self.task.named_parameters():
            value = masters.weight(param)
            if name.startswith(prefix):
                found[name] = value.detach().to("cpu", torch.float32, copy=True)
        persistent = self.task.state_dict(keep_vars=True).keys()
        for name, buffer in self.task.named_buffers():
            if name.startswith(prefix) and name in persistent:
                found[name] = buffer.detach().to("cpu", copy=True)
        return found

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """The trainable weights in fp32, on their device, by name: to read at once, not to keep. Collective."""
        whole = self.config.zero < 3 and self.config.precision in ("fp32", "bf16")  # no rank needs the others'
        masters = None if whole else self.masters()
        for name, param in self.task.named_parameters():
            if param.requires_grad:
                yield name, param.detach() if masters is None else masters.weight(param)

    def masters(self) -> Masters:
        """Access to fp32 weights and optimizer state by parameter, at any ZeRO stage."""
        return Masters(self._ds, self.config.zero, self._gathered)

    def scaler(self) -> dict[str, float]:
        """The state of fp16's dynamic loss scale; empty for other precisions."""
        scaler = getattr(self._ds.optimizer, "loss_scaler", None)
        if self.config.precision != "fp16" or scaler is None:
            return {}
        return {key: value for key, value in vars(scaler).items() if isinstance(value, (int, float))}

    def restore_scaler(self, state: Mapping[str, float]) -> None:
        for key, value in state.items():
            setattr(self._ds.optimizer.loss_scaler, key, value)

    def _add_decays(self) -> None:
        """Keep the starting weights that groups are pulled to; called before a checkpoint can change them."""
        anchored = {name for group in self.groups if group["anchored"] for name in group["names"]}
        if anchored or any(group["cautious"] for group in self.groups):
            masters = self.masters()
            held = {masters.flat[param]: name for name, param in self.task.named_parameters() if name in anchored}
            Decay(masters.optimizer, held)

    def _broadcast_buffers(self) -> None:
        if self.world > 1:
            for buffer in self.task.buffers():
                torch.distributed.broadcast(buffer, 0)


def settings(config: Engine.Config, micro_batch: int) -> dict[str, Any]:
    """The DeepSpeed dictionary of a recipe: the whole of it, generated."""
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        "zero_optimization": {"stage": config.zero, "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,  # what needs shapes is refused by our own check, with the reason
        "steps_per_print": 2**31 - 1,
        # Safe modules would have their gradients reduced in bf16; none are, so reductions stay in fp32.
        "torch_autocast": {
            "enabled": config.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }
    if config.precision == "bf16_pure":
        made["bf16"] = {"enabled": True}
    if config.precision == "fp16":
        made["fp16"] = {"enabled": True}
    # DeepSpeed clips at 1.0 when it is told nothing. At stage 0 we clip, to know the norm.
    made["gradient_clipping"] = config.clip if config.clip is not None and config.zero > 0 else 0.0
    for key, value in config.deepspeed.items():
        made[key] = {**made[key], **value} if isinstance(value, dict) and isinstance(made.get(key), dict) else value
    return made


def _preflight(config: Engine.Config, device: torch.device) -> None:
    if config.precision == "fp16" and device.type == "cpu":
        raise InputError("engine.precision: fp16 does not run on a CPU; use precision=bf16 or fp32")
    if config.compile and device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise InputError(
            "engine.compile: torch.compile needs a C++ compiler (g++) on a CPU; install one or set engine.compile=false"
        )


def _checkpoint_activations(task: Task) -> None:
    model = task.backbone.model
    if not hasattr(model, "set_grad_checkpointing"):
        raise InputError(f"engine.checkpointing: {type(model).__name__} cannot recompute activations; set it to false")
    try:
        model.set_grad_checkpointing(True)
    except AssertionError as error:
        raise InputError(
            f"engine.checkpointing: {type(model).__name__} cannot recompute activations; set it to false"
        ) from error
