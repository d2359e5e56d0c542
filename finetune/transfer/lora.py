"""Low-rank adaptation (Hu et al. 2022) through peft: the weights stay, and a product of two thin matrices is added."""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from finetune.transfer import Transfer
from penstock.errors import InputError
from penstock.optim import kind_of
from penstock.recipe import Block
from penstock.schedule import Clock
from penstock.task import Task

VIT_MODULES = r".*\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)"
BASE, ADAPTER = ".base_layer.", "default"  # names that peft gives


class LoRA(Transfer):
    """Adapters and the head train. B starts at 0, so the network starts as it was; exports hold the merged weights."""

    class Config(Block):
        name: Literal["lora"] = "lora"
        rank: int = Field(8, ge=1, description="rank of the added matrices")
        alpha: float = Field(16.0, gt=0, description="what is added is scaled by alpha / rank")
        dropout: float = Field(0.0, ge=0, lt=1, description="before the adapters")
        modules: str | None = Field(
            None, description="regular expression of layers by name; null: a ViT's attention and MLP"
        )
        norms: bool = Field(False, description="train the scales and shifts of norms as well")

        @field_validator("modules")
        @classmethod
        def _compiles(cls, modules: str | None) -> str | None:
            try:
                re.compile(modules or "")
            except re.error as error:
                raise ValueError(f"{modules!r} is not a regular expression: {error}") from error
            return modules

    def prepare(self, task: Task, clock: Clock) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        model: Any = task.backbone.model
        self._check_modules(model)
        inject_adapter_in_model(
            LoraConfig(
                r=self.config.rank,
                lora_alpha=self.config.alpha,
                lora_dropout=self.config.dropout,
                target_modules=self.config.modules or VIT_MODULES,
            ),
            model,
            ADAPTER,
        )
        for prefix, module in model.named_modules():
            for name, param in module.named_parameters(recurse=False):
                if self.config.norms and ".lora_" not in f".{prefix}" and kind_of(module, name) == "norm":
                    param.requires_grad_(True)
        # Statistics are weights of the network that an adapter cannot carry, so they stay as they were.
        self.closed = {
            f"backbone.model.{name}": math.inf
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        }

    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, value in state.items():
            if ".lora_" in name:
                continue
            layer, base, own = name.rpartition(BASE)
            if base and own == "weight":
                down, up = (state[f"{layer}.lora_{which}.{ADAPTER}.weight"] for which in "AB")
                value = value + self.config.alpha / self.config.rank * product(down, up)
            found[f"{layer}.{own}" if base else name] = value
        return found

    def _check_modules(self, model: nn.Module) -> None:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        wanted = re.compile(self.config.modules or VIT_MODULES)
        chosen = {name: layer for name, layer in layers.items() if wanted.fullmatch(name)}
        if not chosen:
            raise InputError(
                f"transfer.modules: {wanted.pattern!r} names no linear layer or convolution of {type(model).__name__}; "
                f"it has {', '.join(list(layers)[:6])}, ..."
            )
        grouped = [name for name, layer in chosen.items() if getattr(layer, "groups", 1) > 1]
        if grouped:
            raise InputError(f"transfer.modules: {grouped[0]} is a grouped convolution, which takes no adapter")


def product(down: Tensor, up: Tensor) -> Tensor:
    """What a layer's adapters add to its weight: B A, for linear layers and for convolutions ([r, I, h, w], [O, r])."""
    return torch.einsum("or,ri...->oi...", up.flatten(1), down)
