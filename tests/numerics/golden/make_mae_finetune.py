"""Golden numbers of the reference's MAE finetuning and linear probing, written to mae_finetune.json beside this file.

Run where github.com/facebookresearch/mae is checked out (its licence is CC-BY-NC; none of its code is here):
    python -m tests.numerics.golden.make_mae_finetune PATH_OF_THE_CHECKOUT
Weights, images and gradients come from tests/numerics/formula.py; what is computed is computed in double precision.
"""

import importlib.util
import json
import math
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import nn

from tests.numerics import formula

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
BATCH, STEPS_PER_EPOCH = 4, 1251  # 1024 of ImageNet's images at a time, the last incomplete batch dropped
# FINETUNE.md. Rates are for the batch of 1024, as main_finetune.py computes them.
RECIPES: dict[str, dict[str, Any]] = {
    "b": {"epochs": 100, "lr": 5e-4 * 1024 / 256, "layer_decay": 0.65},
    "l": {"epochs": 50, "lr": 1e-3 * 1024 / 256, "layer_decay": 0.75},
}
LARS_STEPS, LARS_SHAPE = 3, (7, 48)


def load(checkout: str, file: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(file).stem, Path(checkout) / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill(model: nn.Module) -> None:
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(formula.weight(name, param.shape))


def targets() -> torch.Tensor:
    """Soft targets as mixing gives them, smoothed: [BATCH, classes]."""
    return formula.tensor("targets", (BATCH, SMALL["num_classes"])).mul(3).softmax(1)


def outputs(models: Any) -> dict[str, Any]:
    """Logits, loss and gradients of a small ViT with either pooling."""
    found = {}
    for pool in ("avg", "token"):
        norm = partial(nn.LayerNorm, eps=1e-6)
        model = models.VisionTransformer(global_pool=pool == "avg", norm_layer=norm, qkv_bias=True, **SMALL).double()
        fill(model)
        images = 2 * formula.tensor("images", (BATCH, 3, SMALL["img_size"], SMALL["img_size"]))
        logits = model.head(model.forward_features(images))  # what `forward` was when the reference was written
        loss = SoftTargetCrossEntropy()(logits, targets())
        loss.backward()
        found[pool] = {
            "logits": logits.tolist(),
            "loss": loss.item(),
            "gradients": {name: formula.summary(name, param.grad) for name, param in model.named_parameters()},
        }
    return found


def probe(models: Any) -> dict[str, Any]:
    """The head of main_linprobe.py on the class token: logits in training, and in evaluation afterwards."""
    model = models.VisionTransformer(
        global_pool=False, norm_layer=partial(nn.LayerNorm, eps=1e-6), qkv_bias=True, **SMALL
    ).double()
    fill(model)
    model.head = nn.Sequential(nn.BatchNorm1d(SMALL["embed_dim"], affine=False, eps=1e-6), model.head).double()
    images = 2 * formula.tensor("images", (BATCH, 3, SMALL["img_size"], SMALL["img_size"]))
    with torch.no_grad():
        features = model.forward_features(images)
        trained = model.head(features)
        model.head.eval()
        return {"training": trained.tolist(), "evaluation": model.head(features).tolist()}


def lars(optimizers: Any) -> list[list[float]]:
    """The probe's weight after each step of the reference's LARS at rate 6.4, as norm and product."""
    weight = nn.Parameter(formula.tensor("probe", LARS_SHAPE) * 0.01)
    optimizer = optimizers.LARS([weight], lr=6.4, weight_decay=0.0)
    found = []
    for step in range(LARS_STEPS):
        weight.grad = formula.tensor(f"gradient {step}", LARS_SHAPE)
        optimizer.step()
        found.append(formula.summary("probe", weight.detach()))
    return found


def groups(models: Any, decay: Any, recipe: dict[str, Any], size: str) -> list[dict[str, Any]]:
    build = {"b": models.vit_base_patch16, "l": models.vit_large_patch16}[size]
    with torch.device("meta"):
        model = build(num_classes=1000, global_pool=True, drop_path_rate=0.1)
    made = decay.param_groups_lrd(model, 0.05, model.no_weight_decay(), recipe["layer_decay"])
    names = {id(param): name for name, param in model.named_parameters()}
    return [group | {"params": sorted(names[id(param)] for param in group["params"])} for group in made]


def rates(schedule: Any, recipe: dict[str, Any]) -> dict[str, float]:
    """The rate of a group of scale 1 at some steps: the first, the warm-up's middle and end, the middle, the last."""
    args = Namespace(lr=recipe["lr"], min_lr=1e-6, warmup_epochs=5, epochs=recipe["epochs"])
    total, warm = recipe["epochs"] * STEPS_PER_EPOCH, 5 * STEPS_PER_EPOCH
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": 1.0}])
    steps = [0, 1, warm // 2, warm - 1, warm, warm + 1, total // 2, 3 * total // 4, total - 2, total - 1]
    found = {}
    for step in steps:
        epoch, within = divmod(step, STEPS_PER_EPOCH)
        schedule.adjust_learning_rate(optimizer, within / STEPS_PER_EPOCH + epoch, args)
        found[str(step)] = optimizer.param_groups[0]["lr"]
    assert math.isclose(found[str(warm)], recipe["lr"])
    return found


def main(checkout: str) -> None:
    models, decay = load(checkout, "models_vit.py"), load(checkout, "util/lr_decay.py")
    schedule, optimizers = load(checkout, "util/lr_sched.py"), load(checkout, "util/lars.py")
    golden = {
        "outputs": outputs(models),
        "probe": probe(models),
        "lars": lars(optimizers),
        "groups": {size: groups(models, decay, recipe, size) for size, recipe in RECIPES.items()},
        "rates": {size: rates(schedule, recipe) for size, recipe in RECIPES.items()},
    }
    file = Path(__file__).with_name("mae_finetune.json")
    file.write_text(json.dumps(golden, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
