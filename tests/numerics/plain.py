"""A finetuning recipe as a plain PyTorch loop of timm's own pieces, in one process with the whole batch.

Shared with Penstock are only the data (which images come when is tested elsewhere) and the weights that a run starts
from; the model, its classifier, the loss, the optimizer, the groups, the schedule and the average are timm's.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor

from finetune.recipe import Finetune
from penstock.recipe import check, load
from tests.shards import pixels_of, png, write_set

WHOLE = 5e-5  # difference of all weights, as a share of their change
EACH = 2e-3  # of one tensor
STEPS, BATCH, CLASSES, SIDE = 4, 16, 5, 64
WARMUP = 2

RECIPE = f"""
name: run
duration: {STEPS} steps
batch: {BATCH}
data: {{train: SET, val: SET, workers: 0, max_bad: 0}}
augment: {{name: resize_crop, size: {SIDE}, crop_pct: 1}}
backbone: {{name: resnet50, size: {SIDE}, options: {{layers: [1, 2, 1, 1], act_layer: silu}}}}
head: {{init_std: 0.05}}
batchnorm: {{recalibrate: 0}}
optim: {{lr: 1}}
engine: {{precision: fp32}}
monitor: {{at_start: false, pictures: null}}
tracking: {{enabled: false, every: 1 steps}}
"""


@dataclass(frozen=True)
class Case:
    """A recipe's overrides, and timm's words for the same."""

    overrides: tuple[str, ...]
    optimizer: dict[str, Any]
    loss: Callable[[Tensor, Tensor], Tensor]
    lr: float
    model: dict[str, Any]
    clip: float | None = None
    ema: float | None = None


# Fewer blocks, to save time; smooth, as a ReLU that a last bit switches moves some biases by 1.5 % of their change.
RESNET = {"model_name": "resnet50", "layers": (1, 2, 1, 1), "act_layer": "silu"}
AVERAGE = "average={name: ema, decay: 0.7, warmup: false}"
SCHEDULE = f"schedule: {{name: cosine, warmup: {WARMUP} steps, end: 0.1}}"
VIT = {"model_name": "vit_small_patch16_224", "img_size": SIDE, "depth": 4}
VIT_IS = (f"backbone={{name: vit_small_patch16_224, size: {SIDE}, options: {{depth: 4}}}}",)
# eps: a bias of keys has no gradient but rounding errors, which Adam would blow up to whole steps.
ADAMW = "name: adamw, lr: 0.001, weight_decay: 0.1, eps: 0.0001"


def optim(words: str) -> str:
    return f"optim={{{words}, {SCHEDULE}}}"


CASES = {
    "resnet50": Case(
        ("loss={name: cross_entropy, smoothing: 0.1}", optim("name: momentum, lr: 0.001, weight_decay: 0.01")),
        {"opt": "momentum", "weight_decay": 1e-2, "momentum": 0.9},
        LabelSmoothingCrossEntropy(0.1),
        lr=0.001,
        model=RESNET,
    ),
    "resnet50 with an average": Case(
        (AVERAGE, optim("name: sgd, lr: 0.001, weight_decay: 0.01")),
        {"opt": "sgd", "weight_decay": 1e-2, "momentum": 0.9},
        torch.nn.CrossEntropyLoss(),
        lr=0.001,
        model=RESNET,
        ema=0.7,
    ),
    "vit_small": Case(
        (*VIT_IS, optim(f"{ADAMW}, layer_decay: 0.7"), "loss={name: cross_entropy, smoothing: 0.1}"),
        {"opt": "adamw", "weight_decay": 0.1, "eps": 1e-4, "layer_decay": 0.7},
        LabelSmoothingCrossEntropy(0.1),
        lr=1e-3,
        model=VIT,
    ),
    "vit_small with an average, clipped": Case(
        (*VIT_IS, optim(ADAMW), "loss={name: binary, smoothing: 0.1}", "engine.clip=0.05", AVERAGE),
        {"opt": "adamw", "weight_decay": 0.1, "eps": 1e-4},
        BinaryCrossEntropy(smoothing=0.1),
        lr=1e-3,
        model=VIT,
        clip=0.05,
        ema=0.7,
    ),
}


@dataclass
class Outcome:
    """Losses of the steps, and the weights and buffers after the last, by timm's names."""

    losses: list[float]
    state: dict[str, Tensor]


def make_set(folder: Path) -> Path:
    """48 images of 5 classes, three batches an epoch, and the recipe."""
    content = [png(pixels_of(number, SIDE, SIDE)) for number in range(48)]
    write_set(folder, [20, 28], content=content.__getitem__, label=lambda number: number % CLASSES)
    (folder / "recipe.yaml").write_text(RECIPE.replace("SET", str(folder)), encoding="utf-8")
    return folder


def recipe_of(folder: Path, overrides: tuple[str, ...]) -> Any:
    return check(Finetune, load(folder / "recipe.yaml", overrides))


def run(rank: int, world: int, folder: Path, out: Path, overrides: tuple[str, ...]) -> int:
    """The recipe as `python -m finetune` runs it, on each rank; the exit code."""
    from finetune.run import start

    return start(recipe_of(folder, (*overrides, f"out={out}")))


def outcome(out: Path) -> Outcome:
    """What a run left behind."""
    lines = (out / "run/journal.jsonl").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in map(json.loads, lines):
        if "train/loss" in line.get("metrics", {}):
            found[line["step"]] = line["metrics"]["train/loss"]
    return Outcome([found[step] for step in range(1, STEPS + 1)], load_file(out / "run/export/model.safetensors"))


def starting(recipe: Any) -> tuple[Any, Any]:
    """The task as a run of the recipe starts with it, and the stream of its images."""
    from finetune.run import Finetuning
    from penstock.assembly import INIT, _stream
    from penstock.keyed import key
    from penstock.schedule import Clock
    from penstock.streams.data import Data

    data = Data(recipe.data, recipe.seed)
    clock = Clock.of(recipe.duration, recipe.batch, data.part.samples)
    torch.manual_seed(key(recipe.seed, INIT))
    task = Finetuning(recipe).task(data, clock)
    return task, _stream(recipe, clock, task.backbone)


def plain(folder: Path, case: Case) -> tuple[Outcome, dict[str, Tensor]]:
    """The same by timm, and the state it began with."""
    task, stream = starting(recipe_of(folder, case.overrides))
    model: Any = timm.create_model(num_classes=CLASSES, **case.model)
    classifier = model.default_cfg["classifier"]
    held = {name.removeprefix("backbone.model."): value for name, value in task.state_dict().items()}
    named = {name.replace("head.linear", classifier): value for name, value in held.items()}
    model.load_state_dict(named)
    begin = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = create_optimizer_v2(model, lr=case.lr, **case.optimizer)
    _last_norm_with_the_head(model, optimizer)
    schedule = CosineLRScheduler(
        optimizer, STEPS - WARMUP, lr_min=0.1 * case.lr, warmup_t=WARMUP, warmup_prefix=True, t_in_epochs=False
    )
    average = ModelEmaV3(model, decay=case.ema) if case.ema else None
    model.train()
    losses, batches = [], stream.batches(0)
    for step in range(STEPS):
        schedule.step_update(step)
        batch = next(batches)
        images = (batch.views[0] / 255 - task.backbone.mean[:, None, None]) / task.backbone.std[:, None, None]
        loss = case.loss(model(images), batch.labels)
        loss.backward()
        if case.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if average is not None:
            average.update(model)
    return Outcome(losses, (average.module if average is not None else model).state_dict()), begin


def _last_norm_with_the_head(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """The one difference: timm counts a ViT's last norm to the last block; BEiT, MAE and Penstock to the head."""
    own = {id(param) for name, param in model.named_parameters() if name.startswith(("norm.", "fc_norm."))}
    for group in list(optimizer.param_groups):
        moved = [param for param in group["params"] if id(param) in own and group.get("lr_scale", 1.0) != 1.0]
        if moved:
            group["params"] = [param for param in group["params"] if id(param) not in own]
            rest = {key: value for key, value in group.items() if key not in ("params", "lr_scale")}
            optimizer.add_param_group(rest | {"params": moved, "lr_scale": 1.0})


def compare(ours: Outcome, theirs: Outcome, begin: dict[str, Tensor]) -> None:
    """Raise AssertionError where losses, weights or running statistics are apart."""
    assert ours.state.keys() == theirs.state.keys()
    apart = [abs(our / loss - 1) for our, loss in zip(ours.losses, theirs.losses, strict=True)]
    assert max(apart) <= WHOLE, f"losses {ours.losses} instead of {theirs.losses}"
    change = {name: (value - begin[name]).float().norm().item() for name, value in theirs.state.items()}
    apart_by = {name: (ours.state[name] - value).float().norm().item() for name, value in theirs.state.items()}
    weights = [name for name in change if "running_" not in name and "num_batches" not in name]
    total = math.hypot(*(change[name] for name in weights))
    difference = math.hypot(*(apart_by[name] for name in weights))
    assert difference <= WHOLE * total, f"weights {difference:.3g} apart after a change of {total:.3g}"
    for name in change:
        # What hardly moves, such as a bias before a norm, is held to the changes of the rest.
        moved = max(change[name], 1e-3 * total)
        assert apart_by[name] <= EACH * moved, f"{name}: {apart_by[name]:.3g} apart after a change of {moved:.3g}"
