"""A pretrained backbone as a folder that timm itself can open.

`model.safetensors` has timm's names, `config.json` timm's own format with a `penstock` section, so that
`timm.create_model("local-dir:FOLDER", pretrained=True)` gives the same outputs for images normalised with its mean and
std; `load_export` gives the same as a `Backbone`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.backbones import Backbone
from penstock.backbones.weights import CONFIG_FILE, WEIGHTS_FILE
from penstock.errors import InputError
from penstock.streams.atomic import sync_folder


def export_backbone(
    state: Mapping[str, Tensor], config: Backbone.Config, folder: Path, about: Mapping[str, Any] | None = None
) -> Path:
    """Write an export; an older one of the same name is replaced, and a crash leaves the old one or none.

    Args:
        state: `Backbone.state_dict()`, whole tensors (not a rank's shard of them).
        about: what to remember, JSON values only: the recipe's digest, the run, the step.
    """
    from safetensors.torch import save_file

    weights = {name.removeprefix("model."): value.detach().cpu().contiguous().clone() for name, value in state.items()}
    description = _timm_config(config, weights)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(weights, partial / WEIGHTS_FILE, metadata={"format": "pt"})
    description["penstock"] = {
        "backbone": config.model_copy(update={"weights": None}).model_dump(mode="json"),
        "create": f"timm.create_model('local-dir:{folder.name}', pretrained=True)  # started in the folder above",
        "sha256": _digest(partial / WEIGHTS_FILE),
        **(about or {}),
    }
    (partial / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    _replace(partial, folder)
    return folder


def load_export(folder: str | Path) -> Backbone:
    """The backbone of an export, in the state it was written in.

    Raises:
        InputError: the folder is no export, or its weights are damaged.
    """
    folder = Path(folder)
    described = folder / CONFIG_FILE
    for file in (described, folder / WEIGHTS_FILE):
        if not file.is_file():
            raise InputError(f"{folder} is not an export: it has no {file.name}")
    try:
        about = json.loads(described.read_text(encoding="utf-8"))["penstock"]
        config = Backbone.Config(**{**about["backbone"], "weights": str(folder)})
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{described} does not describe a Penstock export: {error}") from error
    if _digest(folder / WEIGHTS_FILE) != about["sha256"]:
        raise InputError(
            f"{folder / WEIGHTS_FILE} is damaged: its checksum is not the one in {CONFIG_FILE}; export again"
        )
    return Backbone(config)


def _timm_config(config: Backbone.Config, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """timm's description of the model, after a check that the weights are its weights."""
    from timm.models import get_model_args

    # On the meta device a model costs nothing; its construction must not move the run's random numbers either.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone = Backbone(config.model_copy(update={"weights": None}))
    expected = {name: value.shape for name, value in backbone.model.state_dict().items()}
    given = {name: value.shape for name, value in weights.items()}
    if expected != given:
        differ = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
        raise ValueError(f"not the state of {config.name}: {differ[:5]} and {max(len(differ) - 5, 0)} more differ")
    inherited: dict[str, Any] = dict(backbone.model.pretrained_cfg)
    source = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "tag", "architecture", "license")
    preprocessing = {
        "custom_load": False,
        "num_classes": 0,
        "input_size": [config.channels, *config.height_width],
        "test_input_size": None,
        "mean": config.per_channel(config.mean),
        "std": config.per_channel(config.std),
    }
    return {
        "architecture": config.name.split(".", 1)[0],
        "num_classes": 0,
        "num_features": backbone.dim,
        "model_args": get_model_args(backbone.model),
        "pretrained_cfg": {key: value for key, value in inherited.items() if key not in source} | preprocessing,
    }


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _replace(partial: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(folder.parent)
