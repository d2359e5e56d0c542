"""A trained network as a folder that timm itself can open: a backbone, or a classifier with its classes.

`model.safetensors` has timm's names, `config.json` timm's own format with a `penstock` section, so that
`timm.create_model("local-dir:FOLDER", pretrained=True)` gives the same outputs for images normalised with its mean and
std; `load_export` gives the same as a `Backbone`, `load_classifier` as a `Classifier`.

A head that timm has no place for (attentive, or behind a LayerNorm) is a file of its own, `head.safetensors`; timm then
opens the backbone alone.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penstock.backbones import Backbone
from penstock.backbones.weights import CONFIG_FILE, WEIGHTS_FILE
from penstock.errors import InputError
from penstock.head import Head, set_linear
from penstock.streams.sets.atomic import sync_folder

HEAD_FILE = "head.safetensors"

log = logging.getLogger(__name__)


def export_backbone(
    state: Mapping[str, Tensor], config: Backbone.Config, folder: Path, about: Mapping[str, Any] | None = None
) -> Path:
    """Write an export; an older one of the same name is replaced, and a crash leaves the old one or none.

    Args:
        state: `Backbone.state_dict()`, whole tensors (not a rank's shard of them).
        about: what to remember, JSON values only: the recipe's digest, the run, the step.
    """
    weights = _timm_names(state)
    return _write(folder, {WEIGHTS_FILE: weights}, _timm_config(config, weights), config, about or {})


def export_classifier(
    state: Mapping[str, Tensor],
    config: Backbone.Config,
    head: Head.Config,
    folder: Path,
    classes: Sequence[str],
    about: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
) -> Path:
    """Write a classifier; its dropout is left out, and a batch norm before its linear layer is folded into that.

    Args:
        state: of a module with `backbone` and `head`, whole tensors by those names, adapters merged.
        classes: names in the order of the logits.
        preprocessing: timm's keys of how images are prepared, such as crop_pct and interpolation; mean, std and the
            size are the backbone's.
        temperature: what calibration divides logits by; the exported logits are not divided.
    """
    backbone = _timm_names({n.removeprefix("backbone."): v for n, v in state.items() if n.startswith("backbone.")})
    description = _timm_config(config, backbone)
    description["pretrained_cfg"] |= dict(preprocessing or {})
    made = _head_of(state, config, head, len(classes))
    linear, names = made.folded(), classifier_names(config)
    about = {**(about or {}), "temperature": temperature, "classes": list(classes)}
    files = {WEIGHTS_FILE: backbone}
    if linear is not None and names is not None:
        # timm averages the logits of two tokens: a layer of their mean is the same as itself on either.
        second = linear if made.second is None else (made.second.weight.detach(), made.second.bias.detach())
        files[WEIGHTS_FILE] = backbone | {
            name: _plain(value)
            for names_of_layer, layer in zip(names, (linear, second), strict=False)
            for name, value in zip(names_of_layer, layer, strict=True)
        }
        description |= {"num_classes": len(classes), "label_names": list(classes)}
        description["model_args"]["num_classes"] = description["pretrained_cfg"]["num_classes"] = len(classes)
        kind: Any = "linear" if made.second is None else "distilled"
        about["head"] = Head.Config(kind=kind).model_dump(mode="json")
    else:
        files[HEAD_FILE] = {name: _plain(value) for name, value in made.state_dict().items()}
        about["head"] = head.model_copy(update={"init": "random"}).model_dump(mode="json")
        log.warning("%s: timm has no place for this head, which is saved beside; timm opens the backbone alone", folder)
    return _write(folder, files, description, config, about)


def load_export(folder: str | Path) -> Backbone:
    """The backbone of an export, of either kind, in the state it was written in.

    Raises:
        InputError: the folder is no export, or its weights are damaged.
    """
    about = read_about(folder)
    try:
        config = Backbone.Config(**{**about["backbone"], "weights": str(folder)})
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{Path(folder) / CONFIG_FILE} does not describe a Penstock export: {error}") from error
    return Backbone(config)


class Classifier(nn.Module):
    """A trained classifier: uint8 images [B, C, H, W] in, fp32 logits [B, K] out.

    Attributes:
        classes: names, in the order of the logits.
        temperature: what the logits are divided by for calibrated probabilities.
        preprocessing: how images are prepared, by timm's keys: input_size, crop_pct, interpolation, mean, std.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        classes: Sequence[str],
        temperature: float = 1.0,
        preprocessing: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.backbone, self.head, self.classes = backbone, head, tuple(classes)
        self.temperature, self.preprocessing = temperature, dict(preprocessing or {})

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def probabilities(self, images: Tensor) -> Tensor:
        """Calibrated probabilities [B, K]."""
        return (self(images) / self.temperature).softmax(-1)


def load_classifier(folder: str | Path) -> Classifier:
    """The classifier of an export, in eval mode.

    Raises:
        InputError: the folder is no export, holds a backbone alone, or its weights are damaged.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    about = read_about(folder)
    if "classes" not in about:
        raise InputError(f"{folder} is the export of a backbone, without a classifier; give that of a finetuned model")
    backbone = load_export(folder)
    head = Head(Head.Config(**about["head"]), backbone.dim, len(about["classes"]), backbone)
    if (folder / HEAD_FILE).is_file():
        head.load_state_dict(load_file(folder / HEAD_FILE))
    else:
        weights, names = load_file(folder / WEIGHTS_FILE), classifier_names(backbone.config)
        assert names is not None  # it was written under these names
        for layer, names_of_layer in zip((head.linear, head.second), names, strict=False):
            if layer is not None:
                set_linear(layer, *(weights[name] for name in names_of_layer))
    described = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["pretrained_cfg"]
    return Classifier(backbone, head, about["classes"], about["temperature"], described).eval()


def export_folder(model: Path) -> Path:
    """The export that a run or export folder is or holds. Raises InputError where there is none."""
    model = model.expanduser()
    for folder in (model, model / "export"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    what = (
        "is no export and holds none" if model.is_dir() else "does not exist" if not model.exists() else "is no folder"
    )
    raise InputError(f"{model} {what}; give a run folder, the export folder in it, or timm:MODEL")


def read_about(folder: str | Path) -> dict[str, Any]:
    """The `penstock` section of an export, after a check of its files."""
    described = Path(folder) / CONFIG_FILE
    for file in (described, Path(folder) / WEIGHTS_FILE):
        if not file.is_file():
            raise InputError(f"{folder} is not an export: it has no {file.name}")
    try:
        about = json.loads(described.read_text(encoding="utf-8"))["penstock"]
        sums = {WEIGHTS_FILE: about["sha256"]} | about.get("sha256_beside", {})
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{described} does not describe a Penstock export: {error}") from error
    for name, digest in sums.items():
        if not (Path(folder) / name).is_file() or _digest(Path(folder) / name) != digest:
            raise InputError(
                f"{Path(folder) / name} is damaged: its checksum is not the one in {CONFIG_FILE}; export again"
            )
    return about


def classifier_names(config: Backbone.Config) -> list[tuple[str, str]] | None:
    """timm's names of the classifier's weight and bias, of two layers where the network has a distillation token.

    None where the classifier is no linear layer of pooled features, or of those tokens.
    """
    from timm.layers import Linear as TimmLinear  # casts under autocast, else torch's own

    bare = config.model_copy(update={"weights": None})
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model: Any = Backbone(bare).model
        try:
            model.reset_classifier(7)
            layers = model.get_classifier()
        except (AttributeError, TypeError, AssertionError, NotImplementedError):
            return None
    layers = layers if isinstance(layers, tuple) and hasattr(model, "head_dist") else (layers,)
    if any(type(layer) not in (nn.Linear, TimmLinear) or layer.bias is None for layer in layers):
        return None
    places = {id(module): name for name, module in model.named_modules()}
    return [(f"{places[id(layer)]}.weight", f"{places[id(layer)]}.bias") for layer in layers]


def _head_of(state: Mapping[str, Tensor], config: Backbone.Config, head: Head.Config, classes: int) -> Head:
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            backbone = Backbone(config.model_copy(update={"weights": None}))
        made = Head(head, backbone.dim, classes, backbone)
    made.load_state_dict({n.removeprefix("head."): v for n, v in state.items() if n.startswith("head.")})
    return made.eval()


def _timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): _plain(value) for name, value in state.items()}


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().clone()


def _write(
    folder: Path,
    files: Mapping[str, Mapping[str, Tensor]],
    description: dict[str, Any],
    config: Backbone.Config,
    about: Mapping[str, Any],
) -> Path:
    from safetensors.torch import save_file

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, tensors in files.items():
        save_file(dict(tensors), partial / name, metadata={"format": "pt"})
    sums = {name: _digest(partial / name) for name in files}
    description["penstock"] = {
        "backbone": config.model_copy(update={"weights": None}).model_dump(mode="json"),
        "create": f"timm.create_model('local-dir:{folder.name}', pretrained=True)  # started in the folder above",
        "sha256": sums.pop(WEIGHTS_FILE),
        "sha256_beside": sums,
        **about,
    }
    (partial / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    _replace(partial, folder)
    return folder


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
