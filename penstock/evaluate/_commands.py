"""`penstock evaluate EXPORT DATA`. Heavy imports wait until the command runs."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.arguments import count, place
from penstock.errors import DONE, InputError

if TYPE_CHECKING:
    from penstock.backbones import Backbone
    from penstock.streams.sets.manifest import Manifest

DESCRIPTION = """Measure an export. A classifier: its accuracy and calibration, with and without the temperature in
the export (fitted to half of its run's own validation set), on images prepared as the export says. A backbone, or with
--features: kNN and a linear probe on its frozen features; --set changes an evaluation or how images are prepared, as
--set knn.k=10 --set linear.labels_per_class=[1,5] --set augment.crop_pct=1."""
WHOLE_BELOW = 96  # pixels; backbones for smaller images see them whole, larger ones the usual centre crop
CLASSIFIERS = ("size", "crop_pct", "precision", "predictions")  # options that mean nothing without a classifier
FEATURES = ("val", "only", "set", "untrained")  # and with one


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("evaluate", help="measure a classifier or a backbone", description=DESCRIPTION)
    add = parser.add_argument
    add("export", metavar="EXPORT", help="an export folder, a run folder that holds one, or timm:NAME")
    add(
        "data",
        metavar="DATA",
        type=place,
        help="what holds packed sets `train` and `val`; for a classifier `val` alone, or a set itself",
    )
    add("--limit", metavar="N", type=count, help="at most N images of each set, a fixed subset")
    add("--batch", metavar="N", type=count, default=256, help="images per forward (256)")
    add("--workers", metavar="N", type=int, default=2, help="decoding processes (2)")
    add("--format", choices=("table", "json"), default="table")
    add = parser.add_argument_group("a classifier").add_argument
    add("--size", metavar="PIXELS", type=count, help="side of the images (the export's test size)")
    add("--crop-pct", metavar="SHARE", type=float, help="share of the short side that is seen (as the export says)")
    add("--precision", choices=("fp32", "bf16"), help="bf16: under autocast (fp32)")
    add("--predictions", metavar="FILE.npz", type=Path, help="keep positions, labels and logits")
    add = parser.add_argument_group("features").add_argument
    add("--features", action="store_true", help="measure a classifier's backbone instead")
    add("--val", metavar="DIR", type=place, help="the packed set that is classified; DATA is then the one learned from")
    add("--only", metavar="NAME", action="append", help="leave the other evaluations out; may be repeated")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="an option, as knn.k=10; may be repeated")
    add("--untrained", action="store_true", help="random weights in the same architecture: the baseline")
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> int:
    from penstock.export import read_about

    export = _folder(args.export)
    if export is None or args.features or "classes" not in read_about(export):
        _refuse(args, CLASSIFIERS, "of a classifier's accuracy, but features are measured here; leave it out")
        return _evaluate_features(args, export)
    _refuse(args, FEATURES, f"of features, but {export} is a classifier; add --features to measure its backbone")
    from penstock.evaluate._classifier import evaluate_classifier

    evaluate_classifier(args, export)
    return DONE


def _refuse(args: argparse.Namespace, options: tuple[str, ...], why: str) -> None:
    for option in options:
        if getattr(args, option) not in (None, False, []):
            raise InputError(f"--{option.replace('_', '-')} is an option {why}")


def _evaluate_features(args: argparse.Namespace, export: Path | None) -> int:
    folders = {name: f"{args.data}/{name}" for name in ("train", "val")}
    if args.val is not None:
        folders = {"train": args.data, "val": args.val}

    from penstock import distributed
    from penstock.evaluate import measure
    from penstock.health import alarms
    from penstock.streams.evaluation import EvalStream
    from penstock.streams.images import Images
    from penstock.streams.sets.manifest import Manifest

    manifests = {name: Manifest.load(folder) for name, folder in folders.items()}
    _check_labels(manifests)
    backbone = _open(args.export, export, args.untrained)
    settings = _settings(args.only, args.set, backbone)
    augment = settings.pop("augment")
    device = distributed.device()
    train, val = (
        EvalStream(
            Images(manifests[name], channels=backbone.config.channels),
            augment,
            batch=args.batch,
            workers=args.workers,
            limit=args.limit,
            device_type=device.type,
        )
        for name in folders
    )
    measured = measure(backbone.to(device), settings, train, val, device)
    warnings = alarms(measured.health, measured.dim)
    if measured.unreadable:
        warnings.append(f"{measured.unreadable} samples could not be read and are left out; `penstock shards verify`")
    if args.format == "json":
        counts = {"train": train.samples, "val": val.samples}
        results = {"metrics": measured.metrics, "health": measured.health, "samples": counts, "warnings": warnings}
        print(json.dumps(results, indent=2))
    else:
        _print(args, measured.metrics, measured.health, measured.dim, (train.samples, val.samples), warnings)
    return DONE


def _folder(export: str) -> Path | None:
    """The export folder that is meant; None for timm's own weights."""
    from penstock.export import export_folder

    return None if export.startswith("timm:") else export_folder(Path(export))


def _open(name: str, export: Path | None, untrained: bool) -> "Backbone":
    import torch

    from penstock.backbones import Backbone
    from penstock.export import load_export

    torch.manual_seed(0)
    if export is None:
        return Backbone(_config(name.removeprefix("timm:"), None if untrained else "timm"))
    backbone = load_export(export)
    return Backbone(backbone.config.model_copy(update={"weights": None})) if untrained else backbone


def _config(name: str, weights: str | None) -> Any:
    from penstock.backbones import Backbone
    from penstock.recipe import Source, check

    values = {"name": name, "weights": weights}
    return check(Backbone.Config, Source(values=values, path=Path(f"timm:{name}")))


def _settings(only: list[str] | None, settings: list[str], backbone: "Backbone") -> dict[str, Any]:
    """The checked config of each evaluation by name, and under `augment` the augmentation itself."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from pydantic import create_model

    from penstock.augment import AUGMENTATIONS
    from penstock.evaluate import EVALUATIONS
    from penstock.recipe import COMMAND_LINE, Block, Source, check, flatten, one_of

    height, width = backbone.size
    if height != width:
        raise InputError(f"the backbone takes images of {height} x {width}, and evaluation prepares square ones only")
    for setting in settings:
        if "=" not in setting:
            raise InputError(f"--set {setting}: not of the form key=value")
    try:
        given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(settings))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"--set {' '.join(settings)}: {error}") from error
    names = only or EVALUATIONS.names()
    kinds: dict[str, Any] = {name: (EVALUATIONS.get(name).Config, ...) for name in names}
    augment = given.get("augment", {})
    augment = {"name": augment} if isinstance(augment, str) else {"name": "resize_crop", **augment}
    augment.setdefault("size", height)
    if augment["name"] == "resize_crop":
        augment.setdefault("crop_pct", 1.0 if height < WHOLE_BELOW else 0.875)
    values = {name: {} for name in names} | given | {"augment": augment}
    model = create_model("Settings", __base__=Block, augment=(one_of("penstock.augment"), None), **kinds)
    origins = {key: COMMAND_LINE for key, _ in flatten(given)}
    checked = check(model, Source(values=values, origins=origins, path=Path("the command line")))
    found = {name: getattr(checked, name) for name in names}
    return found | {"augment": AUGMENTATIONS.get(checked.augment.name)(checked.augment)}


def _check_labels(manifests: "dict[str, Manifest]") -> None:
    for manifest in manifests.values():
        if manifest.unlabelled:
            raise InputError(
                f"evaluation needs labels, but {manifest.unlabelled} of {manifest.samples} samples of {manifest.root} "
                "have none; pack it from a folder per class"
            )
    train, val = (manifest.classes for manifest in manifests.values())
    if train and val and train != val:
        raise InputError(
            f"the training set has the classes {_some(train)}, the validation set {_some(val)}; their numbers would "
            "mean different things, so pack both from folders of the same names"
        )


def _some(classes: tuple[str, ...]) -> str:
    return f"{', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''} ({len(classes)})"


def _print(
    args: argparse.Namespace,
    metrics: dict[str, float],
    health: dict[str, float],
    dim: int,
    samples: tuple[int, int],
    warnings: list[str],
) -> None:
    from rich.console import Console
    from rich.table import Table

    untrained = ", untrained" if args.untrained else ""
    table = Table(title=f"{args.export}{untrained}: {samples[0]:,} training, {samples[1]:,} validation images")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        if name.endswith(("_std", "_lr", "_whitened")):  # how the probe was set, not how good it is
            continue
        spread = metrics.get(f"{name}_std")
        table.add_row(name, f"{value:.2f} %" if spread is None else f"{value:.1f} ± {spread:.1f} %")
    table.add_section()
    table.add_row("spread of features (1 is ideal)", f"{health['spread']:.3f}")
    table.add_row("effective rank", f"{health['effective_rank']:.1f} of {dim}")
    console = Console()
    console.print(table)
    for warning in warnings:
        console.print(f"[yellow]warning:[/] {warning}")
