"""Makes lr_decay.json: rate and decay that MAE's finetuning gives each parameter of a ViT-B, by the reference's code.

    python -m tests.numerics.golden.make_lr_decay CHECKOUT

CHECKOUT is a copy of https://github.com/facebookresearch/mae (util/lr_decay.py is run, none of it is kept here).
"""

import importlib.util
import json
import sys
from pathlib import Path

import timm
import torch

DECAY, LAYER_DECAY = 0.05, 0.65  # FINETUNE.md, ViT-Base


def main(checkout: str) -> None:
    spec = importlib.util.spec_from_file_location("lr_decay", Path(checkout) / "util" / "lr_decay.py")
    assert spec is not None and spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    found: dict[str, dict[str, list[float]]] = {}
    for pool in ("avg", "token"):  # the last norm is fc_norm, or norm
        with torch.device("meta"):
            model = timm.create_model("vit_base_patch16_224", num_classes=1000, global_pool=pool)
        groups = reference.param_groups_lrd(model, DECAY, model.no_weight_decay(), LAYER_DECAY)
        names = {id(param): name for name, param in model.named_parameters()}
        found[pool] = {
            names[id(param)]: [group["lr_scale"], group["weight_decay"]]
            for group in groups
            for param in group["params"]
        }
    file = Path(__file__).with_name("lr_decay.json")
    file.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
