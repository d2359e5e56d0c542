"""Weights for a backbone from a file: a Penstock export, safetensors, or a published PyTorch checkpoint."""

import argparse
import json
import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penstock import distributed
from penstock.errors import InputError

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
MATCH = 0.9  # share of the model's tensors that a file must hold, unless the recipe says otherwise
# What checkpoints wrap a state dict in. An average of the weights comes before the weights, a teacher before a student.
_WRAPPERS = ("model_ema", "state_dict_ema", "model", "state_dict", "teacher", "student", "target_encoder", "encoder")
# Of several encoders in one file that fit equally well, the earlier is meant (MoCo v3 and MoCo: the trained one).
_PREFERRED = ("teacher", "base_encoder", "encoder_q", "backbone", "encoder", "student")
# What checkpoints hold beside the backbone: MAE's decoder, the token of masked patches, classifiers.
_BESIDE = re.compile(r"decoder_|mask_token$|head(_dist)?\.|fc\.|classifier\.")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What became of every tensor of a file and of a model."""

    path: Path
    inside: str  # wrappers and prefix that were taken off, as `model_ema` or `module.base_encoder.`
    loaded: int
    total: int  # tensors of the model
    missing: tuple[str, ...]  # of the model, that keep their initial values
    unexpected: tuple[str, ...]  # of the file, without a place
    beside: tuple[str, ...]  # of the file, of a decoder or a classifier
    resampled: tuple[str, ...]  # what was resampled to another size

    def __str__(self) -> str:
        lines = [f"{self.path}{self.inside and f' ({self.inside})'}: {self.loaded} of {self.total} tensors loaded"]
        for names, text in (
            (self.missing, "lacks {}, which keep their initial values"),
            (self.unexpected, "no place for {}"),
            (self.beside, "left out {}: a decoder or classifier"),
            (self.resampled, "resampled {}"),
        ):
            if names:
                lines.append(f"  {text.format(grouped(names))}")
        return "\n".join(lines)


def load_weights(model: nn.Module, path: Path, size: tuple[int, int], match: float = MATCH) -> Report:
    """Fill `model` (a timm model) from `path`, resampling position embeddings to images of `size`.

    The report, in which every tensor appears, is logged.

    Args:
        match: the least share of the model's tensors that the file must hold.

    Raises:
        InputError: the file cannot be read, holds another model's weights, or tensors of other shapes.
    """
    found, saved_size, inside = read_weights(path)
    own = model.state_dict()
    found, prefix = _without_prefix(found, own)
    found = _as_timm(found, model, own)
    beside = {key for key in found if _BESIDE.match(key) and key not in own}
    state = {key: value for key, value in found.items() if key not in beside}
    resampled = _resample_positions(state, own, model, size, saved_size)
    unexpected, missing = sorted(state.keys() - own.keys()), sorted(own.keys() - state.keys())
    fits = {key: value for key, value in state.items() if key in own}
    if not fits or len(fits) < match * len(own):
        raise InputError(
            f"{path} does not hold weights of this backbone: {len(missing)} of {len(own)} tensors are missing "
            f"({grouped(missing)}), {len(unexpected)} have no place ({grouped(unexpected)}); "
            f"check backbone.name and backbone.options, or set backbone.match below {len(fits) / len(own):.2f}"
        )
    wrong = [
        f"{key} is {list(value.shape)}, the backbone has {list(own[key].shape)}"
        for key, value in fits.items()
        if value.shape != own[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(
            f"{path} holds weights of other shapes: {', '.join(wrong[:5])}{more}; "
            "check backbone.name, channels and options"
        )
    model.load_state_dict(fits, strict=False)
    report = Report(
        path,
        "".join((inside and f"{inside}.", prefix)).rstrip("."),
        len(fits),
        len(own),
        tuple(missing),
        tuple(unexpected),
        tuple(key for key in found if key in beside),
        tuple(resampled),
    )
    if distributed.is_main():
        log.log(logging.WARNING if missing or unexpected else logging.INFO, "%s", report)
    return report


def grouped(names: Iterable[str], most: int = 8) -> str:
    """Names with the numbers of layers left open, counted: `blocks.*.ls1.gamma (12), norm.bias`."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    shown = [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def read_weights(path: Path) -> tuple[dict[str, Tensor], tuple[int, int] | None, str]:
    """Tensors by the file's names, the image size they were made for where the file says it, and what wrapped them."""
    size = None
    if not path.exists():
        raise InputError(f"there is no file or folder {path}; give an export folder or a checkpoint file")
    if path.is_dir():
        if not (path / WEIGHTS_FILE).is_file():
            raise InputError(f"{path} holds no {WEIGHTS_FILE}; give an export folder or a checkpoint file")
        if (path / CONFIG_FILE).is_file():
            made_for = read_config(path / CONFIG_FILE).get("pretrained_cfg", {}).get("input_size")
            size = (int(made_for[1]), int(made_for[2])) if made_for else None
        path = path / WEIGHTS_FILE
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path), size, ""
        # Published checkpoints hold their command line, too: a Namespace is no more than a dictionary.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many kinds; each means that the file is no checkpoint
        raise InputError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from error
    inside: list[str] = []
    while isinstance(loaded, Mapping):
        wrapper = next((name for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)), None)
        if wrapper is None:
            break
        inside.append(wrapper)
        loaded = loaded[wrapper]
    held = loaded if isinstance(loaded, Mapping) else {}
    tensors = {str(key): value for key, value in held.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{path} is not a dictionary of tensors, nor one under {', '.join(map(repr, _WRAPPERS))}")
    return tensors, size, ".".join(inside)


def read_config(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error


def _without_prefix(found: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors under the prefix that gives the most names of the model, the prefix taken off."""
    counts: Counter[str] = Counter()
    for key in found:
        parts = key.split(".")
        for start in range(min(len(parts), 5)):
            counts[".".join(parts[:start]) + "." * bool(start)] += ".".join(parts[start:]) in own

    def rank(prefix: str) -> tuple[int, int]:
        order = [place for place, name in enumerate(_PREFERRED) if name in prefix.split(".")]
        return counts[prefix], -min(order, default=len(_PREFERRED))

    best = max(counts, key=rank) if counts else ""
    return {key.removeprefix(best): value for key, value in found.items() if key.startswith(best)}, best


def _as_timm(found: dict[str, Tensor], model: nn.Module, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under timm's names, where timm knows how to rename a published model's (DINOv2, ConvNeXt, ...)."""

    def strangers(state: Mapping[str, Tensor]) -> int:
        return sum(key not in state or state[key].ndim != value.ndim for key, value in own.items())

    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if rename is None or strangers(found) == 0:
        return found
    encoder = {key: value for key, value in found.items() if not key.startswith("decoder_")}
    try:
        renamed = rename(dict(encoder), model)
    except (KeyError, AttributeError, RuntimeError, ValueError, AssertionError, TypeError):
        return found  # another family's names; the report says what is missing
    return renamed if strangers(renamed) < strangers(found) else found


def _resample_positions(
    state: dict[str, Tensor],
    own: Mapping[str, Tensor],
    model: nn.Module,
    size: tuple[int, int],
    saved_size: tuple[int, int] | None,
) -> list[str]:
    if "pos_embed" not in state or "pos_embed" not in own or own["pos_embed"].ndim != 3:
        return []
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None:
        return []
    from timm.layers import resample_abs_pos_embed

    grid = (size[0] // patch[0], size[1] // patch[1])
    prefix = own["pos_embed"].shape[1] - grid[0] * grid[1]
    side = math.isqrt(max(state["pos_embed"].shape[1] - prefix, 0))
    old = (saved_size[0] // patch[0], saved_size[1] // patch[1]) if saved_size else (side, side)
    if old == grid or old[0] * old[1] != state["pos_embed"].shape[1] - prefix:
        return []
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], list(grid), list(old), prefix)
    return [f"pos_embed from {old[0]} x {old[1]} to {grid[0]} x {grid[1]} patches"]
