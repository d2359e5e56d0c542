"""What a pretraining recipe may say."""

from collections.abc import Iterator
from typing import Any

from penstock.backbones.backbone import Backbone
from penstock.recipe import one_of
from penstock.registry import Registry
from penstock.rules import channels_agree, patches_divide
from penstock.stage import Recipe

METHODS = Registry("pretrain.methods")


def accumulation_keeps_the_batch(recipe: Any) -> Iterator[str]:
    if METHODS.get(recipe.method.name).looks_across_samples and recipe.engine.accumulation > 1:
        yield (
            f"engine.accumulation: {recipe.engine.accumulation} would shrink the batch that {recipe.method.name} "
            "compares images in; set it to 1, and use more ranks or engine.checkpointing to save memory"
        )


def method_works(recipe: Any) -> list[str]:
    return METHODS.get(recipe.method.name).conflicts(recipe)


class Pretrain(Recipe):
    """A backbone pretrained without labels."""

    backbone: Backbone.Config
    method: one_of("pretrain.methods")  # type: ignore[valid-type]

    rules = (*Recipe.rules, accumulation_keeps_the_batch, channels_agree, patches_divide, method_works)
