"""Recipes of distillation against their originals: rates by the published formulas, what decays, what is weighed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune.recipe import Finetune
from penstock.backbones import Backbone
from penstock.head import Head
from penstock.optim import parameter_groups
from penstock.recipe import check, load
from penstock.schedule import Clock, value_at
from penstock.stage import inputs_are_here

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
IMAGES = {"imagenet1k": 1_281_167, "imagenet22k": 14_197_122}
Rate = Callable[[float], float]  # of the epochs done


def recipe_of(name: str) -> Any:
    return check(Finetune, load(CONFIGS / f"{name}.yaml"), without=(inputs_are_here,))


def cosine(peak: float, end: float, warmup: float, start: float, epochs: float) -> Rate:
    def rate(epoch: float) -> float:
        if epoch < warmup:
            return start + (peak - start) * epoch / warmup
        return end + (peak - end) * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2

    return rate


def steps(peak: float) -> Rate:
    """A tenth after 30, 60 and 90 epochs, and no warm-up."""
    return lambda epoch: peak * 0.1 ** sum(epoch >= milestone for milestone in (30, 60, 90))


BIT_WARMUP = 5000 * 4096 / IMAGES["imagenet1k"]
# name: batch, the rate, weight decay as the optimizer takes it, its name
PUBLISHED: dict[str, tuple[int, Rate, float, str]] = {
    "imagenet1k/deit_vitb16_distilled": (1024, cosine(5e-4 * 2, 1e-5, 5, 1e-6, 300), 0.05, "adamw"),
    "imagenet1k/deit_vitti16_distilled": (1024, cosine(5e-4 * 2, 1e-5, 5, 1e-6, 300), 0.05, "adamw"),
    "imagenet1k/dkd_r18": (512, steps(0.2), 1e-4, "momentum"),
    "imagenet1k/dist_r18": (256, steps(0.1), 1e-4, "sgd"),
    "imagenet1k/patient_r50": (4096, cosine(0.03, 0, BIT_WARMUP, 0, 1200), 3e-4 / 0.03, "adamw"),
    "imagenet1k/distill_mobilenetv4_s": (768, cosine(0.048, 0, 3, 1e-6, 450), 1e-5, "rmsproptf"),
    "imagenet22k/tinyvit_21m": (4096, cosine(2.5e-4 * 8, 5e-6 * 8, 5, 5e-7 * 8, 90), 0.01, "adamw"),
    "imagenet1k/finetune_tinyvit_21m": (1024, cosine(2.5e-4 * 2, 1e-5 * 2, 5, 5e-7 * 2, 30), 1e-8, "adamw"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_rates_are_the_published_ones(name):
    batch, rate, decay, optimizer = PUBLISHED[name]
    recipe = recipe_of(name)
    assert (recipe.batch, recipe.optim.weight_decay, recipe.optim.name) == (batch, pytest.approx(decay), optimizer)
    clock = Clock.of(recipe.duration, recipe.batch, IMAGES[name.partition("/")[0]])
    half = clock.total // 2
    for step in (0, 1, 400, clock.total // 10, half, int(0.95 * clock.total), clock.total - 1):
        found = recipe.optim.peak(recipe.batch) * value_at(recipe.optim.schedule, step, clock)
        assert found == pytest.approx(rate(step * clock.batch / clock.epoch), rel=2e-4, abs=1e-9), step


def decayed_by_the_original(name: str, key: str, param: nn.Parameter) -> bool:
    if name == "imagenet1k/dkd_r18":
        return True  # mdistiller: one group
    if name == "imagenet1k/patient_r50":
        return param.ndim == 4 or key == "head.linear.weight"  # big_vision: what ends with /kernel
    tokens = ("pos_embed", "cls_token", "dist_token", "attention_biases")
    return param.ndim > 1 and not key.endswith((".bias", *tokens))  # timm, DIST and TinyViT


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_decay_that_decayed_there(name):
    recipe = recipe_of(name)
    bare = recipe.backbone.model_copy(update={"weights": None})
    with torch.device("meta"):
        backbone = Backbone(bare)
        module = nn.ModuleDict({"backbone": backbone, "head": Head(recipe.head, backbone.dim, 1000, backbone)})
    groups = parameter_groups(module, recipe.optim.layer_decay, recipe.optim.no_decay)
    decayed = {key: group.decayed for group in groups for key in group.names}
    params = dict(module.named_parameters())
    assert decayed == {key: decayed_by_the_original(name, key, param) for key, param in params.items()}
    assert len({group.lr_scale for group in groups}) == (14 if recipe.optim.layer_decay < 1 else 1)


def test_what_is_weighed():
    def weights(name: str) -> tuple[float, dict[str, dict[str, Any]]]:
        task = recipe_of(name).task
        assert task.name == "distill"
        return task.labels, {key: block.model_dump(exclude={"name"}) for key, block in task.blocks().items()}

    dist = {"dist": {"weight": 1, "inter": 2, "intra": 2, "temperature": 1}}
    assert weights("imagenet1k/deit_vitti16_distilled") == (0.5, {"hard_labels": {"weight": 0.5}})
    assert weights("imagenet1k/dist_r18") == weights("imagenet1k/distill_mobilenetv4_s") == (1, dist)
    assert weights("imagenet1k/dkd_r18")[1] == {"decoupled": {"weight": 1, "alpha": 1, "beta": 0.5, "temperature": 1}}
    for name in ("imagenet1k/patient_r50", "imagenet22k/tinyvit_21m"):
        labels, losses = weights(name)
        assert labels == 0 and list(losses) == ["soft_targets"]
        assert losses["soft_targets"] == {"weight": 1, "temperature": 1, "standardize": False}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "finetune" not in name])
def test_teachers_have_weights_and_take_the_crop(name):
    """As timm lists them: without weights there is none, and a fixed size must be the student's."""
    import timm

    recipe = recipe_of(name)
    teacher = recipe.task.teacher.removeprefix("timm:")
    assert timm.is_model_pretrained(teacher)
    cfg: Any = timm.get_pretrained_cfg(teacher)
    assert cfg.num_classes == (21_841 if "22k" in name else 1000)
    assert cfg.input_size == (3, recipe.augment.size, recipe.augment.size)
