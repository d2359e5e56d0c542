"""Dropout, drop path, attention and patch dropout of timm models, each a number or a curve over the run.

timm makes the modules; here their probabilities are found, and written at each step. Draws come from torch's generator,
which the trainer seeds before every step.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator
from torch import nn

from penstock.backbones import names
from penstock.errors import InputError
from penstock.recipe import Block
from penstock.schedule import Knob, bounds

# timm's argument for each kind, and what it is. `head` is ours: the backbone has no classifier.
ARGUMENTS = {
    "path": "drop_path_rate",
    "attention": "attn_drop_rate",
    "proj": "proj_drop_rate",
    "patch": "patch_drop_rate",
}
ABOUT = {
    "path": "drop path",
    "attention": "attention dropout",
    "proj": "dropout after attention and in the MLP",
    "patch": "patch dropout",
}
NOT_PROJ = ("pos_drop", "head_drop")  # dropouts of timm's that other arguments set


class Drop:
    """The dropouts of a backbone, and the one before the classifier.

    `path` grows linearly with depth, from 0 at the first block to its value at the last, as timm lays it out; one draw
    is made per sample and block. A kind that is 0 is switched off even where timm's default for the model is not.

    torch.compile takes probabilities for constants and compiles anew when one changes, so with `engine.compile` only
    curves that move in steps are allowed (see `drop_rules`).

    Args:
        model: the timm model, created with `Config.timm_arguments`.
        head: the dropout before the classifier, whose probability is `head`.

    Raises:
        InputError: the recipe asks for a kind that the model has no place for.
    """

    class Config(Block):
        head: Knob = Field(0.0, description="dropout before the classifier")
        path: Knob = Field(0.0, description="drop path: whole residual branches, linearly more with depth")
        attention: Knob = Field(0.0, description="dropout of attention weights")
        proj: Knob = Field(0.0, description="dropout after attention and in the MLP")
        patch: Knob = Field(0.0, description="share of patches left out of a ViT's input")

        @model_validator(mode="after")
        def _probabilities(self) -> "Drop.Config":
            for kind in ("head", *ARGUMENTS):
                for value in bounds(getattr(self, kind)):
                    if not 0 <= value < 1:
                        raise ValueError(f"{kind}: a probability lies in [0, 1), and this one reaches {value:g}")
            return self

        def timm_arguments(self, name: str) -> dict[str, float]:
            """What the timm model `name` is to be created with: each kind at its largest value, so that its modules
            exist; kinds that stay 0 are left out.

            Raises:
                InputError: the model lacks one.
            """
            problems = [f"drop.{kind}: {text}" for kind, text in self._lacking(name)]
            if problems:
                raise InputError("\n".join(problems))
            return {ARGUMENTS[kind]: largest(getattr(self, kind)) for kind in ARGUMENTS if self._on(kind)}

        def _on(self, kind: str) -> bool:
            return largest(getattr(self, kind)) > 0

        def _lacking(self, name: str) -> Iterator[tuple[str, str]]:
            accepted = names.arguments(name)
            for kind in ARGUMENTS:
                if self._on(kind) and accepted is not None and ARGUMENTS[kind] not in accepted:
                    have = [each for each in ARGUMENTS if ARGUMENTS[each] in accepted]
                    others = f"it has {', '.join(have)} and head" if have else "it has head alone"
                    yield kind, f"{name} has no {ABOUT[kind]}; set it to 0 ({others})"

    def __init__(self, config: "Drop.Config", model: nn.Module, head: nn.Dropout | None = None):
        self.config = config
        self.places: dict[str, list[Place]] = {kind: [] for kind in ("head", *ARGUMENTS)}
        for kind, module, attribute in _found(model):
            full = largest(getattr(config, kind))
            share = getattr(module, attribute) / full if full > 0 else 0.0
            self.places[kind].append(Place(module, attribute, share))
        if head is not None:
            self.places["head"].append(Place(head, "p", 1.0))
        for kind, places in self.places.items():
            if largest(getattr(config, kind)) > 0 and not places:
                lacks = f"{type(model).__name__} has no {ABOUT[kind]}" if kind in ABOUT else "there is no classifier"
                raise InputError(f"drop.{kind}: {lacks}; set it to 0")
        self.set({kind: largest(getattr(config, kind)) for kind in self.places})

    def set(self, knobs: Mapping[str, float]) -> None:
        """Write this step's values, by kind (`head`, `path`, ...), into the modules; kinds not given stay."""
        for kind in self.places.keys() & knobs.keys():
            for place in self.places[kind]:
                setattr(place.module, place.attribute, place.share * knobs[kind])

    def rates(self) -> dict[str, list[float]]:
        """The probabilities in use, in the order of the model's modules, by kind."""
        return {kind: [getattr(p.module, p.attribute) for p in places] for kind, places in self.places.items()}


@dataclass(frozen=True)
class Place:
    """One probability in a model, and its share of the kind's value."""

    module: nn.Module
    attribute: str
    share: float


def largest(knob: Any) -> float:
    """The largest value a knob takes over any run."""
    return max(bounds(knob))


def drop_rules(recipe: Any) -> Iterator[str]:
    """What in a recipe's `drop` block its other blocks cannot work with; a rule of recipes that have one."""
    drop, options = recipe.drop, recipe.backbone.options
    for kind, text in drop._lacking(recipe.backbone.name):
        yield f"drop.{kind}: {text}"
    for kind, argument in {"head": "drop_rate", **ARGUMENTS}.items():
        if argument in options:
            yield f"backbone.options: {argument} is set by drop.{kind}; take it out here and set drop.{kind}"
        knob = getattr(drop, kind)
        if recipe.engine.compile and getattr(knob, "name", "constant") not in ("constant", "step"):
            yield (
                f"drop.{kind}: under engine.compile every change compiles the model anew; use a number, a curve with "
                "name: step, or engine.compile=false"
            )


def _found(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every probability above 0 in a timm model: its kind, the module and the attribute that hold it."""
    from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices

    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, DropPath) and module.drop_prob > 0:
            yield "path", module, "drop_prob"
        elif isinstance(module, (PatchDropout, PatchDropoutWithIndices)) and module.prob > 0:
            # timm makes it before it counts the distillation token, which would be dropped as a patch is.
            module.num_prefix_tokens = max(module.num_prefix_tokens, getattr(model, "num_prefix_tokens", 0))
            yield "patch", module, "prob"
        elif isinstance(module, nn.Dropout) and module.p > 0 and last not in NOT_PROJ:
            yield ("attention" if last.startswith("attn_drop") else "proj"), module, "p"
        if getattr(module, "attn_drop_p", 0) > 0:  # some fused attention reads a number of its own
            yield "attention", module, "attn_drop_p"
