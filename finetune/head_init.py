"""What a head starts from: random weights, a linear probe, or another classifier's rows by class name."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock import distributed
from penstock.backbones import Backbone
from penstock.class_names import imagenet_names, match_classes
from penstock.errors import InputError
from penstock.head import Head, set_linear
from penstock.streams.batch import Batch

SHOWN = 8  # class names in a message


def initialise(
    head: Head,
    backbone: Backbone,
    classes: Sequence[str],
    train: Callable[[], Iterable[Batch]],
    seed: int = 0,
) -> str:
    """Fill the head as `head.init` says; what was done, for people. Collective, and the same on all ranks.

    Args:
        classes: names in the order of the labels.
        train: opens the labelled training images as they are evaluated, each once, without augmentation; never the
            validation set, which would be measured on what the head has seen. Used by `probe` alone.

    Raises:
        InputError: the source has no classifier, or none of the classes, or the head has no place for it.
    """
    init = head.config.init
    if init == "random":
        return ""
    if init == "probe":
        _only_linear(head, "probe")
        weight, bias, said = _probe(backbone, len(classes), train(), seed)
        set_linear(head.linear, weight, bias)
        return said
    if init == "weights":
        weights = backbone.config.weights
        if weights is None:
            raise InputError("head.init: weights is the classifier in backbone.weights, but that is null; set one")
        source, names = _timm_classifier(backbone) if weights == "timm" else read_classifier(Path(weights), backbone)
    else:
        source, names = read_classifier(Path(init), backbone)
    return _by_name(head, classes, source, names, init)


Layer = tuple[Tensor, Tensor]  # weight [K, D] and bias [K]


def read_classifier(path: Path, backbone: Backbone) -> tuple[Head | list[Layer], Sequence[str]]:
    """A classifier of features like the backbone's and its classes' names, from an export or a published checkpoint.

    The classifier is a head, or a linear layer, or those of the class and of the distillation token.
    """
    from penstock.backbones.weights import CONFIG_FILE, read_config, read_weights
    from penstock.export import classifier_names, load_classifier

    path = path.expanduser()
    described = read_config(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}
    if "classes" in described.get("penstock", {}):
        classifier = load_classifier(path)
        return classifier.head, classifier.classes
    tensors, *_ = read_weights(path)
    layers = [_layer(tensors, keys) for keys in classifier_names(backbone.config) or ()]
    found = [layer for layer in layers if layer is not None]
    if not found or len(found) < len(layers):
        keys = classifier_names(backbone.config)
        raise InputError(f"head.init: {path} holds no classifier ({keys[0][0] if keys else 'a linear layer'})")
    classes = len(found[0][0])
    names = described.get("label_names") or imagenet_names(classes)
    if not isinstance(names, list) or len(names) != classes:
        raise InputError(
            f"head.init: {path} does not name its {classes} classes, and they are not ImageNet's; "
            "give an export with label_names"
        )
    return found, names


def _layer(tensors: Mapping[str, Tensor], keys: tuple[str, str]) -> Layer | None:
    # A prefix, such as that of a wrapper in several processes, may stand before the name.
    weight, bias = (
        next((value for name, value in tensors.items() if name == key or name.endswith(f".{key}")), None)
        for key in keys
    )
    return (weight, bias) if weight is not None and bias is not None and weight.ndim == 2 else None


def _timm_classifier(backbone: Backbone) -> tuple[list[Layer], Sequence[str]]:
    """The classifier that comes with timm's own weights of the backbone."""
    import timm

    with torch.random.fork_rng(devices=[]):
        model: Any = timm.create_model(backbone.config.name, pretrained=True)
    found = model.get_classifier()
    layers = found if isinstance(found, tuple) else (found,)
    names = model.pretrained_cfg.get("label_names") or imagenet_names(model.num_classes)
    if not all(isinstance(layer, torch.nn.Linear) and layer.bias is not None for layer in layers) or not names:
        raise InputError(
            f"head.init: timm's weights of {backbone.config.name} bring no linear classifier of named classes"
        )
    return [(layer.weight.detach(), layer.bias.detach()) for layer in layers], names


def _by_name(head: Head, classes: Sequence[str], source: Head | list[Layer], names: Sequence[str], init: str) -> str:
    if isinstance(source, Head):
        shape = ("kind", "norm", "heads") if source.config.kind == "attentive" else ("kind", "norm")
        differ = [key for key in shape if getattr(source.config, key) != getattr(head.config, key)]
        if differ:
            key = differ[0]
            raise InputError(
                f"head.{key}: {getattr(head.config, key)} here, but {getattr(source.config, key)} in the classifier "
                f"that head.init names ({init}); set them alike"
            )
        own = ("linear.", "second.")
        rest = {name: value for name, value in source.state_dict().items() if not name.startswith(own)}
        head.load_state_dict(rest, strict=False)
        source = [(layer.weight.detach(), layer.bias.detach()) for layer in source.layers]
    elif len(source) == 1:
        _only_linear(head, "another classifier")
    elif head.config.kind != "distilled":
        raise InputError(
            f"head.kind: {head.config.kind} here, but the classifier that head.init names ({init}) has a layer for "
            "each of two tokens; set head.kind=distilled, or head.init=random"
        )
    features = source[0][0].shape[1]
    if features != head.linear.in_features:
        raise InputError(
            f"head.init: the classifier is one of {features} features, this backbone gives "
            f"{head.linear.in_features}; take the classifier of the same network"
        )
    found = match_classes(classes, names)
    if not found:
        raise InputError(
            f"head.init: none of the {len(classes)} classes ({_some(classes)}) is among those of {init} "
            f"({_some(names)}); names must agree but for case, spaces, - and _, or be synsets; else head.init=random"
        )
    rows, old = torch.tensor(list(found)), torch.tensor(list(found.values()))
    for layer, (weight, bias) in zip(head.layers, source, strict=True):
        new_weight, new_bias = layer.weight.detach().clone(), layer.bias.detach().clone()
        new_weight[rows], new_bias[rows] = weight[old].to(new_weight), bias[old].to(new_bias)
        set_linear(layer, new_weight, new_bias)
    fresh = [name for label, name in enumerate(classes) if label not in found]
    start = f"the head starts with {len(found)} of {len(classes)} classes of {init}"
    return f"{start}; new, with random weights: {_some(fresh)}" if fresh else start


def _probe(backbone: Backbone, classes: int, train: Iterable[Batch], seed: int) -> tuple[Tensor, Tensor, str]:
    """LP-FT (Kumar et al. 2022): a linear probe, with a penalty, of the backbone as it is, in eval mode."""
    from finetune.logistic import Logistic, fit
    from penstock.evaluate._features import check_labels, extract

    device = distributed.device()
    features = extract(backbone.to(device), train, device)
    check_labels(features, features)
    if int(features.labels.max()) >= classes:
        raise InputError(f"label {int(features.labels.max())} is out of range: there are {classes} classes")
    if len(features) < 2:
        raise InputError("head.init: a probe needs at least 2 labelled training images; set head.init=random")
    probe: Logistic = distributed.broadcast(fit(features, classes, seed) if distributed.is_main() else None)
    right = probe(features.features).argmax(1) == features.labels
    said = (
        f"the head starts as a linear probe of {len(features)} training images (penalty {probe.penalty:g}), "
        f"{100 * right.double().mean().item():.1f} % right"
    )
    return probe.weight, probe.bias, said


def _only_linear(head: Head, what: str) -> None:
    for key, plain in (("kind", "linear"), ("norm", "none")):
        if getattr(head.config, key) != plain:
            raise InputError(
                f"head.{key}: {getattr(head.config, key)} cannot start from {what}, a linear map of the features; "
                f"set head.{key}={plain}, or head.init=random"
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
