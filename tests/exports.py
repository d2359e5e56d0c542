"""Exports of small untrained classifiers whose answers depend on the image."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from penstock.backbones import Backbone
from penstock.export import export_classifier
from penstock.head import Head

CLASSES = ("ant", "bee", "cow", "dog", "eel")
TEMPERATURE = 1.5
VIT = {
    "name": "vit_tiny_patch16_224",
    "pool": "avg",
    "options": {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
}


def coloured(number: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Noise on a ground of one colour, uint8 [H, W, C], a function of the number."""
    random = np.random.default_rng(number)
    ground = random.integers(0, 192, (1, 1, channels), np.uint8)
    return ground + random.integers(0, 64, (height, width, channels), np.uint8)


def coloured_batch(count: int, channels: int, height: int, width: int) -> np.ndarray:
    """uint8 [B, C, H, W]."""
    images = [coloured(number, height, width, channels) for number in range(count)]
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))


@torch.no_grad()
def write_classifier(folder: Path, fields: dict[str, Any], **head: Any) -> Path:
    """An export of random weights.

    Batch norm has seen images, and the last layer looks at how their features differ, as in a trained network; else
    all images would be of one class.
    """
    backbone = Backbone(Backbone.Config(**fields))
    module = Head(Head.Config(**head), backbone.dim, len(CLASSES), backbone)
    norms = [part for part in backbone.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for part in norms:
        part.weight.uniform_(0.5, 1.5)
        part.bias.normal_(std=0.2)
        part.momentum = None  # the mean over all batches
        part.reset_running_stats()
    images = torch.from_numpy(coloured_batch(32, backbone.config.channels, *backbone.size))
    if norms:
        backbone.train()(images)
    features = backbone.eval()(images)
    module.eval()
    pooled = features.pooled if module.pool is None else module.pool(features.spatial)
    weight = torch.randn(len(CLASSES), pooled.shape[1]) / (pooled.std(0).norm() / 2)
    module.linear.weight.copy_(weight)
    module.linear.bias.copy_(-weight @ pooled.mean(0))
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    state |= {f"head.{name}": value for name, value in module.state_dict().items()}
    prepared = {"crop_pct": 0.9, "test_crop_pct": None, "interpolation": "bicubic"}
    return export_classifier(
        state, backbone.config, module.config, folder, CLASSES, {"run": "a"}, prepared, temperature=TEMPERATURE
    )
