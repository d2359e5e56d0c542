"""`python -m pretrain RECIPE [key=value ...]`"""

import sys

from penstock.stage import main
from pretrain.recipe import Pretrain


def start(recipe: Pretrain, find_lr: bool = False) -> int:
    from pretrain.run import start as run  # torch, timm and DeepSpeed load when a recipe is known to be good

    return run(recipe, find_lr)


if __name__ == "__main__":
    sys.exit(main("pretrain", Pretrain, start))
