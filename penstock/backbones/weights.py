"""Weights for a backbone from a file: a Penstock export, safetensors, or a published PyTorch checkpoint."""

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from penstock.errors import InputError

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
MISSING_AT_MOST = 0.1  # share of the model's tensors a file may lack before it counts as another model's
# What pretraining checkpoints hold beside the encoder: MAE's decoder, classifiers.
_BESIDE = re.compile(r"decoder_|mask_token$|head\.|fc\.|classifier\.")

log = logging.getLogger(__name__)


def load_weights(model: nn.Module, path: Path, size: tuple[int, int]) -> None:
    """Fill `model` (a timm model) from `path`, resampling position embeddings to images of `size`.

    Every tensor of the model that the file lacks, and every tensor of the file without a place, is logged.

    Raises:
        InputError: the file cannot be read, holds another model's weights, or tensors of other shapes.
    """
    found, saved_size = read_weights(path)
    own = model.state_dict()
    beside = {key for key in found if _BESIDE.match(key) and key not in own}
    state = {key: value for key, value in found.items() if key not in beside}
    _resample_positions(state, own, model, size, saved_size)
    unexpected, missing = sorted(state.keys() - own.keys()), sorted(own.keys() - state.keys())
    fits = {key: value for key, value in state.items() if key in own}
    if not fits or len(missing) > MISSING_AT_MOST * len(own):
        raise InputError(
            f"{path} does not hold weights of this backbone: {len(missing)} of {len(own)} tensors are missing "
            f"({_some(missing)}), {len(unexpected)} have no place ({_some(unexpected)}); "
            "check backbone.name and backbone.options"
        )
    wrong = [
        f"{key} is {list(value.shape)}, the backbone has {list(own[key].shape)}"
        for key, value in fits.items()
        if value.shape != own[key].shape
    ]
    if wrong:
        raise InputError(
            f"{path} holds weights of other shapes: {_some(wrong)}; check backbone.name, channels and options"
        )
    model.load_state_dict(fits, strict=False)
    if beside:
        log.info("%s: left out %d tensors of a decoder or head", path, len(beside))
    if unexpected:
        log.warning("%s: no place for %s", path, ", ".join(unexpected))
    if missing:
        log.warning("%s: lacks %s, which keep their initial values", path, ", ".join(missing))


def read_weights(path: Path) -> tuple[dict[str, Tensor], tuple[int, int] | None]:
    """Tensors by timm's names, and the image size they were made for where the file says it."""
    size = None
    if path.is_dir():
        if not (path / WEIGHTS_FILE).is_file():
            raise InputError(f"{path} holds no {WEIGHTS_FILE}; give an export folder or a checkpoint file")
        if (path / CONFIG_FILE).is_file():
            made_for = _read_config(path / CONFIG_FILE).get("pretrained_cfg", {}).get("input_size")
            size = (int(made_for[1]), int(made_for[2])) if made_for else None
        path = path / WEIGHTS_FILE
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path), size
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many kinds; each means that the file is no checkpoint
        raise InputError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"{path} is not a dictionary of tensors, nor one under 'model' or 'state_dict'")
    return {str(key): value for key, value in loaded.items()}, size


def _read_config(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error


def _resample_positions(
    state: dict[str, Tensor],
    own: Mapping[str, Tensor],
    model: nn.Module,
    size: tuple[int, int],
    saved_size: tuple[int, int] | None,
) -> None:
    if "pos_embed" not in state or "pos_embed" not in own or own["pos_embed"].ndim != 3:
        return
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None:
        return
    from timm.layers import resample_abs_pos_embed

    grid = (size[0] // patch[0], size[1] // patch[1])
    prefix = own["pos_embed"].shape[1] - grid[0] * grid[1]
    side = math.isqrt(max(state["pos_embed"].shape[1] - prefix, 0))
    old = (saved_size[0] // patch[0], saved_size[1] // patch[1]) if saved_size else (side, side)
    if old != grid and old[0] * old[1] == state["pos_embed"].shape[1] - prefix:
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], list(grid), list(old), prefix)


def _some(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
