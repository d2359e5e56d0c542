"""What a classifier learns from, one file each: labels, or a teacher as well."""

from dataclasses import dataclass

from finetune.losses import Loss
from finetune.transfer import Transfer
from penstock.backbones import Backbone
from penstock.backbones.dropout import Drop
from penstock.head import Head
from penstock.mixing import Mixing
from penstock.registry import Registry

TASKS = Registry("finetune.tasks")


@dataclass
class Pieces:
    """What a task is made of; `finetune/run.py` builds it from the recipe."""

    backbone: Backbone
    head: Head
    loss: Loss
    mixing: Mixing
    drop: Drop
    transfer: Transfer
    classes: tuple[str, ...]
    mixes: bool  # images are mixed in some part of the run
    sizes: tuple[int, ...] = ()  # sides in pixels of the views that the run will show
