"""The folded form of a finetuned model beside its export."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penstock.backbones import names
from penstock.errors import InputError

TOLERANCE = 1e-4  # of the largest logit


def folding_has_batchnorm(recipe: Any) -> Iterator[str]:
    """A rule of recipes. Other networks are looked at when they are built, before the first step."""
    backbone = recipe.backbone
    if recipe.fold and names.is_vit(backbone.name) and "norm_layer" not in backbone.options:
        yield f"fold: {backbone.name} has LayerNorm, and no batch norm to fold into convolutions; leave fold at false"


def check_foldable(model: nn.Module, name: str) -> None:
    """InputError where a model has no batch norm."""
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise InputError(f"fold: {name} has no batch norm to fold into convolutions; leave fold at false")


def fold_export(folder: Path, images: Tensor) -> str:
    """Add the folded form to the export in `folder`, open it again and compare; what was done, for people.

    Args:
        images: a few of the validation set, uint8 [B, C, H, W].

    Raises:
        RuntimeError: the folded form gives other outputs; it is not to be used.
    """
    import timm

    from penstock.backbones.fold import FOLDED_FILE, load_folded, save_folded
    from penstock.export import load_export

    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    example = load_export(folder).normalize(images)
    folded = save_folded(model, folder, example)
    with torch.no_grad():
        before, after = model(example), load_folded(folder)(example)
    apart = float((after - before).abs().max() / before.abs().max().clamp(min=1e-12))
    if not apart <= TOLERANCE:
        raise RuntimeError(f"the folded form of {folder} gives outputs that are {apart:.1e} of the largest apart")
    layers = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    rest = "" if len(folded) == layers else "; the others are not fed by one convolution or linear layer alone"
    return (
        f"{folder / FOLDED_FILE}: {len(folded)} of {layers} batch norms folded{rest}; outputs of {len(images)} "
        f"validation images at most {apart:.1e} of the largest apart"
    )
