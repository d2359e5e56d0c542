"""A timm model with its own classifier, as an export of ours."""

from pathlib import Path
from typing import Any

import torch

from penstock.backbones import Backbone
from penstock.class_names import imagenet_names
from penstock.errors import InputError
from penstock.export import classifier_names, export_classifier
from penstock.head import Head, set_linear

TIMM = "timm:"
PREPARED = ("crop_pct", "crop_mode", "interpolation", "test_input_size", "test_crop_pct")  # timm's keys that are kept
SET_OTHERWISE = ("num_classes", "in_chans", "img_size", "global_pool", "pretrained")  # by fields of Backbone.Config


def open_timm(name: str) -> tuple[Any, list[str] | None]:
    """timm's pretrained model `timm:NAME` with its classifier, and its classes' names where they are known.

    Raises:
        InputError: there is no such model, or no weights of it.
    """
    import timm

    from penstock.backbones import names

    model_name = name.removeprefix(TIMM)
    try:
        any_size = ":" not in model_name and names.takes_any_size(model_name)
        options: dict[str, Any] = {"dynamic_img_size": True} if any_size else {}
        with torch.random.fork_rng(devices=[]):  # what a run draws must not depend on who teaches it
            model: Any = timm.create_model(model_name, pretrained=True, **options)
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"timm's {model_name} cannot be had: {error}; give a model with weights, or a local folder as "
            "timm:local-dir:FOLDER"
        ) from error
    return model, model.pretrained_cfg.get("label_names") or imagenet_names(model.num_classes)


def adopt(name: str, folder: Path) -> Path:
    """Write timm's pretrained model `timm:NAME`, its classifier included, as the export `folder`.

    Raises:
        InputError: there is no such model or no weights of it, its classes have no names, or its classifier is not
            linear.
    """
    from timm.models import get_model_args

    model, classes = open_timm(name)
    about = dict(model.pretrained_cfg)
    channels, height, width = about["input_size"]
    given = get_model_args(model)
    config = Backbone.Config(
        name=about["architecture"],
        size=(height, width) if height != width else height,
        channels=channels,
        options={key: value for key, value in given.items() if key not in SET_OTHERWISE},
        pool=given.get("global_pool") if given.get("global_pool") in ("avg", "token") else None,
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
    )
    names = classifier_names(config)
    if classes is None or names is None:
        what = "classes without names" if classes is None else "a classifier that is not one linear layer"
        raise InputError(f"{name} has {what}; finetune it on your data (backbone.weights=timm), and take that run")
    with torch.random.fork_rng(devices=[]):
        backbone = Backbone(config)
        head = Head(
            Head.Config(kind="linear" if len(names) == 1 else "distilled"), backbone.dim, len(classes), backbone
        )
    weights = model.state_dict()
    for layer, (weight, bias) in zip((head.linear, head.second), names, strict=False):
        if layer is not None:
            set_linear(layer, weights.pop(weight), weights.pop(bias))
    backbone.model.load_state_dict(weights)
    state = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    state |= {f"head.{key}": value for key, value in head.state_dict().items()}
    preprocessing = {key: about[key] for key in PREPARED if key in about}
    return export_classifier(state, config, head.config, folder, classes, {"run": name}, preprocessing)
