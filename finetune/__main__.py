"""`python -m finetune RECIPE [key=value ...]`, on its own or under torchrun."""

import sys

from finetune.recipe import Finetune
from penstock.stage import main


def start(recipe: Finetune, find_lr: bool = False) -> int:
    from finetune.run import start as run  # timm and DeepSpeed load when a recipe is known to be good

    return run(recipe, find_lr)


if __name__ == "__main__":
    sys.exit(main("finetune", Finetune, start))
