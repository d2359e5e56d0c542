"""`penstock export MODEL` and `penstock predict MODEL IMAGES`. Heavy imports wait until a command runs."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.arguments import count, place
from penstock.errors import DONE, InputError

if TYPE_CHECKING:
    from penstock.formats.write import Written

FORMS = ("torch", "onnx")
WIDTH = 100  # columns, where there is no terminal
EXPORT = """Write a trained network in the forms people deploy: model.pt2 (torch.export: torch alone runs it),
model.onnx and model.int8.onnx. Each takes uint8 images [B, C, H, W], resized and cropped, gives logits and calibrated
probabilities, and has class names, preprocessing, temperature and the weights' checksum inside. The fp32 forms are
compared with the network before they are kept. ONNX needs `pip install 'penstock[export]'`."""
INT8 = """also in int8, with ranges measured on images of this packed set; its accuracy is measured on this processor,
and x86 without VNNI (before 2019) may clip sums of 16 bits and answer otherwise: measure again there"""
NO_VNNI = (
    "int8 was measured on this processor; x86 without VNNI may clip sums and answer otherwise: measure again there"
)
PREDICT = """Labels and calibrated probabilities of images, prepared as in evaluation. A .onnx file is run by
onnxruntime. Images that cannot be read are told on standard error, and the exit code is 0 all the same; where none can
be read it is 2."""


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("export", help="write torch.export, ONNX and int8 files", description=EXPORT)
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="a run or export folder, or timm:NAME with --out")
    add("--to", metavar="FORMS", type=_forms, default=FORMS, help="of torch and onnx, with commas (torch,onnx)")
    add("--int8", metavar="DATA", type=place, help=INT8)
    add("--val", metavar="DATA", type=place, help="packed set to compare the forms on (images of --int8, or noise)")
    add("--out", metavar="FOLDER", type=Path, help="where the files go (the export folder)")
    add("--fold", action="store_true", help="fold batch norm into the layers before it; runtimes may do so as well")
    parser.set_defaults(run=_export)
    parser = subparsers.add_parser("predict", help="labels and probabilities of images", description=PREDICT)
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="a run, an export folder, a .pt2 or .onnx file, or timm:NAME")
    add("images", metavar="IMAGES", type=place, nargs="+", help="files, folders, or a packed set")
    add("--top", metavar="N", type=count, default=5, help="classes told for each image (5)")
    add("--format", choices=("table", "json", "csv"), default="table")
    add("--batch", metavar="N", type=count, default=32, help="images per forward (32)")
    add("--size", metavar="PIXELS", type=count, help="side of the images (the model's own)")
    add("--sheet", metavar="PNG", type=Path, help="draw the images with their labels")
    parser.set_defaults(run=_predict)


def _forms(text: str) -> tuple[str, ...]:
    forms = tuple(dict.fromkeys(text.split(",")))
    if unknown := [form for form in forms if form not in FORMS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(FORMS)}")
    return forms


def _export(args: argparse.Namespace) -> int:
    from penstock.export import export_folder, read_about
    from penstock.formats.write import export_forms
    from penstock.streams.sets.manifest import Manifest

    if "onnx" in args.to or args.int8 is not None:
        from penstock.formats.onnx import need

        need("onnx", "onnxscript", "onnxruntime")  # before any work
    export = _adopted(args) if str(args.model).startswith("timm:") else export_folder(args.model)
    calibration = None if args.int8 is None else Manifest.inside(args.int8, "train")
    val = None if args.val is None else Manifest.inside(args.val, "val")
    out = args.out or export
    rows = export_forms(export, out, args.to, calibration, val, args.fold)
    seen = f"{val.root}" if val else f"images of {calibration.root}" if calibration else "noise"
    _print(f"{out}, compared on {rows[0].agreement.images:,} images ({seen})", rows, read_about(export))
    return DONE


def _adopted(args: argparse.Namespace) -> Path:
    """timm's model, as an export in --out."""
    from penstock.adopt import adopt
    from penstock.backbones.weights import CONFIG_FILE

    if args.out is None:
        raise InputError(f"{args.model} has no folder of its own for the files; say with --out where they go")
    if (args.out / CONFIG_FILE).exists():
        raise InputError(f"--out {args.out} holds an export already; give that as the model, or another folder")
    return adopt(str(args.model), args.out)


def _print(title: str, rows: "list[Written]", about: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    labels, accuracy, timed = "classes" in about, rows[0].agreement.top1 is not None, rows[-1].milliseconds
    table = Table(title=Text(title, "bold"), title_justify="left", box=None, pad_edge=False)
    table.add_column("form", no_wrap=True)
    table.add_column("file", no_wrap=True)
    heads = ["MB", "largest\ndifference", *(["other\nlabel"] if labels else []), *(["top-1"] if accuracy else [])]
    for head in (*heads, *(f"ms at\nbatch {size}" for size in timed)):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        found = row.agreement
        cells = [row.form, row.file.name, f"{row.megabytes:.2f}", f"{found.largest:.1e}"]
        cells += [f"{found.differ:,} of {found.images:,}"] if labels else []
        cells += [f"{found.top1:.2f} %"] if accuracy else []
        table.add_row(*map(Text, cells), *(f"{taken:.2f}" for taken in row.milliseconds.values()))
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else WIDTH
    console.print(table)
    by_form = {row.form: row.milliseconds for row in rows}
    if "int8" in by_form:
        console.print(NO_VNNI)
    if timed and "onnx" in by_form:
        shares = (f"{by_form['int8'][size] / taken:.2f} at batch {size}" for size, taken in by_form["onnx"].items())
        console.print(f"int8 takes this share of ONNX's time in fp32: {', '.join(shares)}")


def _predict(args: argparse.Namespace) -> int:
    from penstock.formats.predict import predict

    predict(args)
    return DONE
