"""Linear or attentive probing: only the head trains, on features that do not change."""

import math
from typing import Literal

from finetune.transfer import Transfer
from penstock.recipe import Block
from penstock.schedule import Clock
from penstock.task import Task


class HeadOnly(Transfer):
    """The backbone is frozen and in eval mode: its weights, batch statistics and dropout."""

    class Config(Block):
        name: Literal["head"] = "head"

    def prepare(self, task: Task, clock: Clock) -> None:
        task.backbone.requires_grad_(False)
        self.closed = {"backbone": math.inf}
