"""Makes distillation.json: losses and gradients of the public reference codes, on inputs made by a formula.

    python -m tests.numerics.golden.make_distillation MDISTILLER DIST_KD

MDISTILLER is a copy of https://github.com/megvii-research/mdistiller (mdistiller/distillers/{DKD,RKD,AT}.py are run),
DIST_KD one of https://github.com/hunto/DIST_KD (segmentation/losses/dist_kd.py is run); none of them is kept here.
"""

import importlib
import json
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.numerics.formula import summary, tensor

ROWS, CLASSES = 10, 7
DKD = {"imagenet": (1.0, 0.5, 1.0), "cifar": (1.0, 8.0, 4.0)}  # alpha, beta, temperature
RKD = {"distance": (25.0, 0.0), "angle": (0.0, 50.0), "both": (25.0, 50.0)}
DIST = {"both": (2.0, 2.0), "inter": (1.0, 0.0), "intra": (0.0, 1.0)}
MAPS = ((6, 5), (9, 4), (12, 2))  # channels of the student and side, by stage


def logits(who: str) -> Tensor:
    return 4 * tensor(f"logits of the {who}", (ROWS, CLASSES))


def labels() -> Tensor:
    return ((tensor("labels", (ROWS,)) + 1) / 2 * CLASSES).long()


def pooled(who: str) -> Tensor:
    return 1 + tensor(f"pooled of the {who}", (ROWS, 5 if who == "student" else 8))


def stages(who: str) -> list[Tensor]:
    wider = 1 if who == "student" else 2
    return [tensor(f"map of the {who}, {side}", (ROWS, wider * width, side, side)) for width, side in MAPS]


def result(loss: Tensor, inputs: list[Tensor]) -> list[float]:
    """The loss, and of each input the gradient's norm and its product with a direction."""
    loss.backward()
    numbers = [loss.item()]
    for index, each in enumerate(inputs):
        assert each.grad is not None
        numbers += summary(f"input {index}", each.grad)
    return numbers


def main(mdistiller: str, dist_kd: str) -> None:
    warnings.simplefilter("ignore")
    package = types.ModuleType("distillers")
    package.__path__ = [str(Path(mdistiller) / "mdistiller" / "distillers")]
    other = types.ModuleType("losses")
    other.__path__ = [str(Path(dist_kd) / "segmentation" / "losses")]
    sys.modules |= {"distillers": package, "losses": other}

    def run(module: str, name: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(module), name)

    def on(inputs: list[Tensor], loss: Callable[..., Tensor], *args: Any, **options: Any) -> list[float]:
        for each in inputs:
            each.requires_grad_().grad = None
        return result(loss(*args, **options), inputs)

    found: dict[str, dict[str, list[float]]] = {"decoupled": {}, "relational": {}, "dist": {}, "attention": {}}
    guess, features, maps = logits("student"), pooled("student"), stages("student")
    dkd, rkd = run("distillers.DKD", "dkd_loss"), run("distillers.RKD", "rkd_loss")
    for case, numbers in DKD.items():
        found["decoupled"][case] = on([guess], dkd, guess, logits("teacher"), labels(), *numbers)
    for case, (distance, angle) in RKD.items():
        options = {"distance_weight": distance, "angle_weight": angle}
        found["relational"][case] = on([features], rkd, features, pooled("teacher"), **options)
    for case, (inter, intra) in DIST.items():
        found["dist"][case] = on([guess], run("losses.dist_kd", "DIST")(inter, intra), guess, logits("teacher"))
    attention = run("distillers.AT", "at_loss")
    found["attention"]["three stages"] = on(maps, attention, maps, stages("teacher"), 2)
    file = Path(__file__).with_name("distillation.json")
    file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
