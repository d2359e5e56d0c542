"""`penstock evaluate` of a classifier: accuracy and calibration, on images prepared as the classifier wants them."""

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from penstock import distributed
from penstock.augment.resize_crop import ResizeCrop
from penstock.backbones import Features
from penstock.class_names import check_classes
from penstock.classification import classification_metrics, per_class_accuracy
from penstock.errors import InputError
from penstock.evaluate._features import FeatureSet, extract
from penstock.evaluate._predictions import write_predictions
from penstock.export import Classifier, load_classifier
from penstock.streams.evaluation import EvalStream
from penstock.streams.images import Images
from penstock.streams.sets.manifest import Manifest

WORST = 5  # classes named in the table


class Measured(NamedTuple):
    """A classifier on one set."""

    metrics: dict[str, float]  # of `classification_metrics`, and `nll_scaled`, `ece_scaled` at the temperature
    per_class: dict[str, float | None]  # top-1 in per cent by name, in label order; None without an image
    temperature: float
    samples: int  # measured
    unreadable: int  # left out
    preprocessing: dict[str, Any]  # size, crop_pct, interpolation
    warnings: list[str]


def evaluate_classifier(args: argparse.Namespace, export: Path) -> None:
    """Measure the classifier in `export` as the command line says, and tell.

    Raises:
        InputError: the set has other classes, or in another order, or no readable image; or the network does not take
            images of the size.
    """
    if args.predictions is not None and (args.predictions.is_dir() or not args.predictions.parent.is_dir()):
        raise InputError(f"--predictions {args.predictions}: no such file can be written; make its folder first")
    manifest = labelled_set(args.data)
    classifier = load_classifier(export)
    warnings = check_set(classifier, manifest)
    augment = prepared(classifier, args.size, args.crop_pct)
    size = None if args.size is None else f"--size {args.size}"
    with torch.autocast(distributed.device().type, torch.bfloat16, enabled=args.precision == "bf16"):
        answers = answer(classifier, manifest, augment, str(export), args.batch, args.workers, args.limit, size)
    if answers.unreadable:
        warnings.append(f"{answers.unreadable} images could not be read and are left out; `penstock shards verify`")
    if args.predictions is not None:
        write_predictions(args.predictions, answers)
    side = side_of(augment)
    options = {"size": side, **augment.config.model_dump(mode="json", include={"crop_pct", "interpolation"})}
    measured = measure(answers, classifier, options, warnings)
    if args.format == "json":
        print(json.dumps(measured._asdict(), indent=2))
    else:
        _print(f"{args.export} on {manifest.root}", measured)


def check_set(classifier: Classifier, manifest: Manifest) -> list[str]:
    """Raise InputError unless the set's labels mean what the classifier's do; warnings, where that is not known."""
    classes = classifier.classes
    if manifest.classes is not None:
        check_classes(classes, manifest.classes, str(manifest.root))
    largest = max(manifest.class_counts, default=0)
    if largest >= len(classes):
        raise InputError(
            f"{manifest.root} has label {largest}, but the classifier has {len(classes)} classes, 0 to "
            f"{len(classes) - 1}; pack the set with folders of the classifier's names"
        )
    if manifest.classes is None and list(classes) != [str(label) for label in range(len(classes))]:
        return [f"{manifest.root} does not name its classes; label 0 is taken for {classes[0]}, and so on"]
    return []


def prepared(classifier: Classifier, size: int | None, crop_pct: float | None) -> ResizeCrop:
    """The images as the export says they are prepared, in timm's words; `size` and `crop_pct` go before."""
    from timm.data import resolve_data_config

    said = resolve_data_config(pretrained_cfg=classifier.preprocessing, use_test_size=True)
    if said["crop_mode"] != "center":
        raise InputError(f"the classifier wants crop_mode {said['crop_mode']!r}, but only 'center' is known here")
    height, width = said["input_size"][-2:]
    if size is None and height != width:
        raise InputError(
            f"the classifier takes images of {height} x {width}, but they are prepared as squares; give --size"
        )
    options = {
        "size": height if size is None else size,
        "crop_pct": said["crop_pct"] if crop_pct is None else crop_pct,
        "interpolation": said["interpolation"],
    }
    try:
        return ResizeCrop(ResizeCrop.Config(**options))
    except ValidationError as error:
        wrong = error.errors()[0]
        name = wrong["loc"][0]
        raise InputError(f"{name}: {options[str(name)]!r} cannot be used to prepare images: {wrong['msg']}") from error


def side_of(augment: ResizeCrop) -> int:
    """Side of the images that `prepared` prepares, in pixels."""
    size = augment.config.size
    assert isinstance(size, int | float)  # no curve
    return round(size)


def answer(
    classifier: Classifier,
    manifest: Manifest,
    augment: ResizeCrop,
    name: str,
    batch: int = 256,
    workers: int = 2,
    limit: int | None = None,
    size: str | None = None,
) -> FeatureSet:
    """Logits of a set's images, as features; under the caller's autocast.

    Args:
        name: of the classifier, for errors.
        limit: measure a fixed subset of so many images.
        size: who asked for images of their size; None where it is the classifier's own.

    Raises:
        InputError: no image can be read, the logits are not finite, or the network takes no images of the size.
    """
    device, channels = distributed.device(), classifier.backbone.config.channels
    images = Images(manifest, channels=channels)
    stream = EvalStream(images, augment, batch=batch, workers=workers, limit=limit, device_type=device.type)
    model = _Logits(classifier).to(device)
    side = side_of(augment)
    with _sizes_refused(name, size), torch.no_grad(), torch.autocast(device.type, enabled=False):
        model(torch.zeros(1, channels, side, side, dtype=torch.uint8, device=device))
    answers = extract(model, stream, device)
    if len(answers) == 0:
        raise InputError(f"none of the {answers.unreadable} images of {manifest.root} can be read")
    if not answers.features.isfinite().all():
        raise InputError(f"some logits of {name} are not finite: the classifier has diverged, or bf16 is too narrow")
    return answers


def measure(
    answers: FeatureSet, classifier: Classifier, preprocessing: dict[str, Any], warnings: list[str]
) -> Measured:
    """The figures of a classifier's answers.

    Args:
        answers: logits as features.
    """
    metrics = classification_metrics(answers.features, answers.labels)
    scaled = classification_metrics(answers.features.double() / classifier.temperature, answers.labels)
    metrics |= {f"{name}_scaled": scaled[name] for name in ("nll", "ece")}
    scores = per_class_accuracy(answers.features, answers.labels).tolist()
    per_class = {
        name: None if math.isnan(score) else score for name, score in zip(classifier.classes, scores, strict=True)
    }
    return Measured(
        metrics, per_class, classifier.temperature, len(answers), answers.unreadable, preprocessing, warnings
    )


class _Logits(nn.Module):
    """A classifier in the place of a backbone: its logits are the features."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Features:
        logits = self.classifier(images)
        return Features(logits, logits)


def labelled_set(data: Path | str) -> Manifest:
    """The set at `data`, or the one named `val` in it."""
    manifest = Manifest.inside(data, "val")
    if manifest.unlabelled:
        raise InputError(
            f"accuracy needs labels, but {manifest.unlabelled} of {manifest.samples} samples of {manifest.root} have "
            "none; pack it from a folder per class"
        )
    return manifest


@contextmanager
def _sizes_refused(name: str, size: str | None) -> Iterator[None]:
    """What goes wrong in the first forward is the size's fault, if one was asked for."""
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        if size is None:
            raise
        raise InputError(f"{size}: {name} does not take such images: {error}") from error


def _print(title: str, measured: Measured) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    metrics, options = measured.metrics, measured.preprocessing
    share = metrics["top1"] / 100
    error = 100 * math.sqrt(share * (1 - share) / measured.samples)
    rows = [("top-1", f"{metrics['top1']:.2f} % ± {error:.2f} (standard error; {measured.samples:,} images)")]
    if "top5" in metrics:
        rows.append(("top-5", f"{metrics['top5']:.2f} %"))
    at = f" at temperature {measured.temperature:.3g}"
    for name, form in (("nll", "{:.4f} nats"), ("ece", "{:.2f} %")):
        scaled = f"; {form.format(metrics[f'{name}_scaled'])}{at}" if measured.temperature != 1 else ""
        rows.append((name.upper(), form.format(metrics[name]) + scaled))
    scores = sorted((score, name) for name, score in measured.per_class.items() if score is not None)
    rows.append(
        ("worst classes" if len(scores) > WORST else "classes", ", ".join(f"{n}: {s:.1f} %" for s, n in scores[:WORST]))
    )
    if absent := len(measured.per_class) - len(scores):
        rows.append(("", f"{absent:,} of {len(measured.per_class):,} classes have no image"))
    rows.append(
        ("images", f"{options['size']} pixels, crop_pct {options['crop_pct']:g}, {options['interpolation']} resizing")
    )
    table = Table(title=Text(title), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(Text(name), Text(text))
    console = Console(highlight=False)
    console.print(table)
    for warning in measured.warnings:
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"))
