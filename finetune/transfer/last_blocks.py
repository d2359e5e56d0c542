"""The head and the last k blocks of the backbone train; everything below is frozen."""

import math
from typing import Any, Literal

from pydantic import Field

from finetune.transfer import Transfer
from finetune.transfer._layers import layers, modules_of
from penstock.errors import InputError
from penstock.recipe import Block
from penstock.schedule import Clock
from penstock.task import Task


class LastBlocks(Transfer):
    class Config(Block):
        name: Literal["last_blocks"] = "last_blocks"
        blocks: int = Field(1, ge=1, description="blocks of the backbone that train, counted from the top")

    def prepare(self, task: Task, clock: Clock) -> None:
        model: Any = task.backbone.model
        ordered = layers(model)
        if self.config.blocks >= len(ordered):
            raise InputError(
                f"transfer.blocks: {self.config.blocks} of {len(ordered)} layers are all of them, or more; "
                f"give at most {len(ordered) - 1}, or use transfer=full"
            )
        frozen = {name for layer in ordered[: -self.config.blocks] for name in layer}
        for name, param in model.named_parameters():
            param.requires_grad_(name not in frozen)
        self.closed = {f"backbone.model.{name}": math.inf for name in modules_of(model, frozen)}
