"""What a pretraining recipe may say."""

from pydantic import model_validator

from penstock.backbones.backbone import Backbone
from penstock.optim import NEEDS_SHAPES
from penstock.recipe import one_of
from penstock.registry import Registry
from penstock.stage import Recipe

METHODS = Registry("pretrain.methods")


class Pretrain(Recipe):
    """A backbone pretrained without labels."""

    backbone: Backbone.Config
    method: one_of("pretrain.methods")  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _fits_together(self) -> "Pretrain":
        problems = self._problems()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> list[str]:
        """Combinations that cannot work, `key: what, and what to write instead`."""
        method, found = METHODS.get(self.method.name), []
        if method.looks_across_samples and self.engine.accumulation > 1:
            found.append(
                f"engine.accumulation: {self.engine.accumulation} would shrink the batch that {self.method.name} "
                "compares images in; set it to 1, and use more ranks or engine.checkpointing to save memory"
            )
        if self.optim.name in NEEDS_SHAPES and self.engine.zero > 0:
            found.append(
                f"optim.name: {self.optim.name} needs whole parameters, which ZeRO-{self.engine.zero} cuts into flat "
                "pieces; set engine.zero=0, or optim.name=adamw"
            )
        if self.backbone.channels != self.data.channels:
            found.append(
                f"data.channels: {self.data.channels} here and {self.backbone.channels} in backbone.channels; "
                "they must agree"
            )
        return found + method.conflicts(self)
