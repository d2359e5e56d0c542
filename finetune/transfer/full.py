"""Every weight trains; a smaller rate for lower layers is `optim.layer_decay`."""

from typing import Literal

from finetune.transfer import Transfer
from penstock.recipe import Block


class Full(Transfer):
    class Config(Block):
        name: Literal["full"] = "full"
