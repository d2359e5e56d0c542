"""DeepSpeed behind a small interface; the only file that imports it.

What DeepSpeed gets silently wrong is settled here: it is given no scheduler and no clipping at stage 0, losses are
scaled once, buffers are broadcast, hyper-parameters are written at every step, a step that is not finite is skipped on
all ranks at every stage, and weights and optimizer state are read and written as plain fp32 tensors by name.
"""

import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from penstock import distributed
from penstock.engine_settings import check_extra
from penstock.engine_state import Masters
from penstock.errors import InputError
from penstock.recipe import Block
from penstock.task import StepOutput, Task

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
        optimizer: over the task's parameters; its groups carry `lr_scale` and `decayed` (penstock/optim.py).
        micro_batch: samples per rank and micro-step.
    """

    class Config(Block):
        zero: Literal[0, 1, 2, 3] = Field(0, description="ZeRO stage; 0 is fastest while the model fits")
        precision: Precision = Field(
            "bf16", description="bf16: fp32 weights, bf16 autocast; bf16_pure, fp16: cast weights"
        )
        accumulation: int = Field(1, ge=1, description="micro-batches per optimizer step")
        clip: float | None = Field(None, gt=0, description="largest norm of the gradient")
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
            return self

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer, config: "Engine.Config", micro_batch: int):
        self.task, self.config = task, config
        self.accumulation, self.world = config.accumulation, distributed.world()
        self.device = distributed.device()
        _preflight(config, self.device)
        if config.checkpointing:
            _checkpoint_activations(task)
        deepspeed = _import_deepspeed(self.device)
        self._ds, _, _, _ = deepspeed.initialize(
            model=task.to(self.device),
            optimizer=optimizer,
            config=settings(config, micro_batch),
            dist_init_required=False,
        )
        # At stage 0 we reduce, at the step: in small buckets, and not at all in a single process.
        self._ds.enable_backward_allreduce = config.zero > 0
        self._gathered = deepspeed.zero.GatheredParameters
        self.groups: list[dict[str, Any]] = self._ds.optimizer.param_groups
        self._micro_step = 0
        self._total: Tensor | None = None
        self._stop = torch.zeros(())
        self._broadcast_buffers()
        if config.compile:
            for part in task.compiled_parts():
                part.compile()

    # One optimizer step ------------------------------------------------------------------------------------------

    def set(self, knobs: Mapping[str, float]) -> None:
        """Write this step's learning rate and weight decay into every parameter group."""
        for group in self.groups:
            group["lr"] = knobs["lr"] * group["lr_scale"]
            group["weight_decay"] = knobs["weight_decay"] if group["decayed"] else 0.0

    def begin(self, valid: Tensor, stop: bool = False) -> None:
        """Start a step whose micro-batches on this rank hold `valid` samples of weight > 0 (a float scalar).

        One reduction tells all ranks both the samples of the step and whether any rank was asked to stop.
        """
        votes = distributed.all_sum(torch.stack([valid.float(), torch.tensor(float(stop))]).to(self.device))
        self._total, self._stop = votes[0].clamp(min=1), votes[1]
        self._micro_step = 0

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
        params = [param for param in self.task.parameters() if param.requires_grad]
        for param in params:
            if param.grad is None:  # it decays all the same, as at the other stages
                param.grad = torch.zeros_like(param)
        if self.world > 1:
            self._ds.buffered_allreduce_fallback(elements_per_buffer=BUCKET)
        norm = nn.utils.get_total_norm([param.grad for param in params if param.grad is not None])
        value = float(norm)
        applied = value == value and abs(value) != float("inf")
        if applied:
            if self.config.clip is not None:
                nn.utils.clip_grads_with_norm_(params, self.config.clip, norm)
            self._ds.step()
        else:
            self._ds.zero_grad()
        return applied, value

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


def start_ranks() -> None:
    """Join the other ranks (torchrun's environment says how); a process on its own becomes a group of one."""
    if distributed.started():
        return
    if "RANK" not in os.environ:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)
    device = distributed.device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, and without the shared-memory op that it would compile at start on a CPU."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with _absent("mlflow"):  # its autotuner would load it, one second and 120 MB in every rank, and works without
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(
            dist_backend="gloo" if device.type == "cpu" else "nccl", auto_mpi_discovery=False, verbose=False
        )
    return deepspeed


@contextmanager
def _absent(module: str) -> Iterator[None]:
    """Importing `module` fails here, unless it was imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


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
