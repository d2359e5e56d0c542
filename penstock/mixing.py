"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of a micro-batch, on its device.

Every draw is keyed by the samples' positions (or by the global micro-batch), so ranks, workers and restarts change
nothing. Sample i of a rank's B is mixed with sample i + B // 2, counted around: as ranks serve positions in turn, that
is the same partner on any number of ranks with an even share each, never the sample itself, and never a neighbour, as
the repeats of repeated augmentation are. The two of a pair draw for themselves: one may be blended, the other not.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from penstock import keyed
from penstock.recipe import Block
from penstock.schedule import Clock, Duration, Knob, Length, bounds, value_at

MIX = 0x3171  # the stream of random numbers that mixing draws from
DRAWS = 6  # mix at all, cut or blend, two for the share kept, the box's centre


class Strength(NamedTuple):
    """What suits models of at least `millions` of parameters that train for at least `epochs`."""

    millions: float
    epochs: float
    mixup: float
    cutmix: float
    source: str


# The last that applies is taken. Small or short-trained networks underfit, and mixing costs them accuracy.
STRENGTHS = (
    Strength(0, 0, 0.0, 0.0, "mixing costs ResNet-18 up to 1.1 points at 100 epochs (OpenMixup)"),
    Strength(20, 75, 0.1, 1.0, "ResNet-50 at 100 and 300 epochs (ResNet strikes back, A3 and A2)"),
    Strength(20, 450, 0.2, 1.0, "ResNet-50 at 600 epochs (ResNet strikes back A1, torchvision)"),
    Strength(50, 40, 0.8, 1.0, "ViT-B and larger (DeiT, DeiT III, MAE finetuning)"),
)


def strength(millions: float, epochs: float) -> Strength:
    """The published strengths for a model of so many million parameters and a run of so many epochs."""
    return [row for row in STRENGTHS if millions >= row.millions and epochs >= row.epochs][-1]


@dataclass(frozen=True)
class _UntilLast:
    """A knob that is 0 in the last part of a run."""

    knob: Any
    last: Length

    def at(self, step: float, clock: Clock) -> float:
        over = step >= clock.total - clock.steps(self.last) - 1e-9
        return 0.0 if over else value_at(self.knob, step, clock)


class Mixing:
    """Mixes images and soft targets; the target's weights are the shares of the pixels."""

    class Config(Block):
        mixup: Knob = Field(0.0, description="alpha of the Beta(alpha, alpha) by which images are blended; 0 is off")
        cutmix: Knob = Field(0.0, description="alpha of the Beta(alpha, alpha) that sizes pasted boxes; 0 is off")
        prob: Knob = Field(1.0, description="share of the samples (or batches) that are mixed")
        switch: float = Field(0.5, ge=0, le=1, description="share of CutMix where both are on")
        mode: Literal["sample", "batch"] = Field(
            "batch", description="draw for each sample, or once for a micro-batch of all ranks, as timm does"
        )
        off_for_last: Duration | None = Field(None, description="no mixing in this last part of the run")
        auto: bool = Field(False, description="choose mixup and cutmix by the model's size and the run's length")

        @model_validator(mode="before")
        @classmethod
        def _smoothing_is_elsewhere(cls, values: Any) -> Any:
            if isinstance(values, dict) and "label_smoothing" in values:
                raise ValueError(
                    "label_smoothing does not belong here: smoothing is applied once, by the loss; set loss.smoothing"
                )
            return values

        @field_validator("mixup", "cutmix", "prob")
        @classmethod
        def _in_range(cls, knob: Any, info: Any) -> Any:
            most = 1.0 if info.field_name == "prob" else math.inf
            for value in bounds(knob):
                if not 0 <= value <= most:
                    rule = "a share lies between 0 and 1" if most == 1.0 else "alpha must not be negative"
                    raise ValueError(f"{rule}, and this one reaches {value:g}")
            return knob

        @model_validator(mode="after")
        def _chosen_once(self) -> "Mixing.Config":
            if self.auto and (self.mixup != 0 or self.cutmix != 0):
                field = "mixup" if self.mixup != 0 else "cutmix"
                raise ValueError(f"{field}: mix.auto=true chooses it; leave it out, or set mix.auto=false")
            return self

        def chosen(self, millions: float, epochs: float) -> tuple["Mixing.Config", str]:
            """These options with `auto` carried out, and a sentence on what was chosen ("" without `auto`)."""
            if not self.auto:
                return self, ""
            row = strength(millions, epochs)
            made = self.model_copy(update={"mixup": row.mixup, "cutmix": row.cutmix, "auto": False})
            return made, (
                f"mix.auto: mixup {row.mixup:g}, cutmix {row.cutmix:g} for {millions:.1f} M parameters and "
                f"{epochs:.3g} epochs; {row.source}"
            )

        def knobs(self) -> dict[str, Any]:
            """What `Mixing` needs to know at each step, for `Curves`: `mixup`, `cutmix` and `mix_prob`."""
            prob = self.prob if self.off_for_last is None else _UntilLast(self.prob, self.off_for_last)
            return {"mixup": self.mixup, "cutmix": self.cutmix, "mix_prob": prob}

    def __init__(self, config: Config, seed: int):
        self.config, self.seed = config, seed

    def __call__(
        self,
        images: Tensor,
        targets: Tensor,
        positions: Tensor,
        weights: Tensor,
        knobs: Mapping[str, float],
        batch_key: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Mixed images and targets; the very tensors given where mixing is off.

        Args:
            images: normalised, floating point [B, C, H, W].
            targets: [B, K], soft, smoothed if they are to be.
            positions: int64 [B], places in the order of samples.
            weights: [B]; a sample of weight 0 is neither mixed nor mixed into another.
            knobs: the values of `Config.knobs` at this step.
            batch_key: for mode=batch, a number of this micro-batch that all ranks know.
        """
        mixup, cutmix, prob = knobs["mixup"], knobs["cutmix"], knobs["mix_prob"]
        away = len(images) // 2
        if away == 0 or prob <= 0 or max(mixup, cutmix) <= 0:
            return images, targets
        names = positions if self.config.mode == "sample" else torch.full_like(positions[:1], batch_key)
        draws = keyed.uniform(self.seed, MIX, names, DRAWS)
        cuts = draws[:, 1] < (self.config.switch if mixup > 0 and cutmix > 0 else float(cutmix > 0))
        alpha = torch.where(cuts, cutmix, mixup)
        # Rounded as the pixels are, for the target is to be what they show.
        kept = symmetric_beta(draws[:, 2], draws[:, 3], alpha).to(images.dtype)
        stays = ~box(kept, draws[:, 4], draws[:, 5], *images.shape[-2:])
        mixed = (draws[:, 0] < prob) & (weights > 0) & (weights.roll(-away) > 0)
        pixels = torch.where(cuts[:, None, None], stays.to(images.dtype), kept[:, None, None])
        pixels = torch.where(mixed[:, None, None], pixels, 1)
        share = torch.where(mixed, torch.where(cuts, stays.sum((1, 2)) / stays[0].numel(), kept.float()), 1)
        # lerp gives the one or the other exactly where a share is 1 or 0.
        return (
            torch.lerp(images.roll(-away, 0), images, pixels[:, None]),
            torch.lerp(targets.roll(-away, 0), targets, share[:, None].to(targets.dtype)),
        )


def symmetric_beta(first: Tensor, second: Tensor, alpha: Tensor | float) -> Tensor:
    """Numbers in [0, 1] distributed as Beta(alpha, alpha), fp64, from pairs of uniform numbers in [0, 1).

    The transform by Student's t (Bailey 1994; Devroye 1996), exact for every alpha > 0: unlike rejection it takes the
    same number of draws always.
    """
    power = torch.expm1(-torch.log1p(-first.double()) / alpha)
    cosine = torch.cos(2 * math.pi * second.double())
    inverse = 1 / (power * cosine.square()).clamp(min=1e-300)  # an infinite power gives 0, and so a share of 0 or 1
    root = (1 + inverse).sqrt()
    lower = 0.5 * inverse / (root * (root + 1))  # (1 - 1 / root) / 2 without its cancellation
    return torch.where(cosine < 0, lower, 1 - lower)


def box(kept: Tensor, row: Tensor, column: Tensor, height: int, width: int) -> Tensor:
    """Boxes of a share 1 - kept of the image, cut off at its borders: bool [B, height, width], true inside.

    Args:
        kept: [B], in [0, 1].
        row, column: [B], the centre as a share of height and width.
    """
    side = (1 - kept.float()).sqrt()
    rows = _between(side, row, height)
    return rows[:, :, None] & _between(side, column, width)[:, None, :]


def _between(side: Tensor, centre: Tensor, pixels: int) -> Tensor:
    length = (side * pixels).round()
    first = (centre * pixels).floor() - (length / 2).floor()
    place = torch.arange(pixels, device=side.device)
    return (place >= first[:, None]) & (place < (first + length)[:, None])
