"""Golden numbers of the reference implementation of MAE, written to mae.json beside this file.

Run where github.com/facebookresearch/mae is checked out (its licence is CC-BY-NC; none of its code is here):
    python -m tests.numerics.golden.make_mae PATH_OF_THE_CHECKOUT
Weights, images and noise come from tests/numerics/formula.py; everything is computed in double precision.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm.models.vision_transformer as vision_transformer
import torch

from tests.numerics import formula

KEYS = ("img_size", "patch_size", "embed_dim", "depth", "num_heads",
        "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "norm_pix_loss", "mask_ratio")  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "norm_pix": dict(zip(KEYS, (32, 8, 64, 2, 4, 32, 2, 4, True, 0.75), strict=True)),
    "pixels": dict(zip(KEYS, (24, 4, 48, 3, 3, 64, 1, 2, False, 0.6), strict=True)),
    "odd_grid": dict(zip(KEYS, (40, 8, 32, 1, 2, 48, 3, 3, True, 0.5), strict=True)),
}
BATCH = 3


def main(checkout: str) -> None:
    sys.path.insert(0, checkout)
    np.float = float  # type: ignore[attr-defined]  # the checkout is older than NumPy 1.24 ...
    modern = vision_transformer.Block
    # ... and older than timm 0.9, whose blocks took a scale of the queries.
    vision_transformer.Block = lambda *args, qk_scale=None, **kwargs: modern(*args, **kwargs)  # type: ignore[misc,assignment]
    import models_mae  # type: ignore[import-not-found]

    golden: dict[str, Any] = {}
    for case, options in CASES.items():
        options = dict(options)
        ratio = options.pop("mask_ratio")
        model = models_mae.MaskedAutoencoderViT(norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), **options).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(formula.weight(name, parameter.shape))
        side = options["img_size"]
        images = 2 * formula.tensor(f"images of {case}", (BATCH, 3, side, side))
        noise = formula.tensor(f"noise of {case}", (BATCH, model.patch_embed.num_patches))
        rand, torch.rand = torch.rand, lambda *args, noise=noise, **kwargs: noise  # type: ignore[assignment]
        loss, pred, mask = model(images, ratio)
        torch.rand = rand
        loss.backward()
        golden[case] = {
            "loss": loss.item(),
            "mask": ["".join(str(int(hidden)) for hidden in row) for row in mask],
            "pred": formula.summary("pred", pred * mask[:, :, None]),
            "positions": formula.summary("positions", model.pos_embed[0]),
            "gradients": {
                name: formula.summary(name, parameter.grad)
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            },
        }
    table = models_mae.get_2d_sincos_pos_embed(16, 14)
    golden["table 14 x 14"] = {"rows": {str(row): table[row].tolist() for row in (0, 1, 14, 100, 195)}}
    target = Path(__file__).with_name("mae.json")
    target.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
