"""`penstock predict`: the labels of images, and how sure the network is."""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from penstock import distributed
from penstock.errors import InputError
from penstock.formats.load import Model, open_model
from penstock.formats.pictures import Picture, pictures

DRAWN, COLUMNS = 240, 8  # images on a sheet, and in a row of it


@dataclass(frozen=True)
class Prediction:
    """What a network says of an image."""

    name: str
    logits: Tensor  # fp32 [K]
    probabilities: Tensor  # calibrated, fp64 [K]
    view: Tensor  # uint8 [C, H, W], as the network saw it

    def best(self, count: int) -> list[tuple[int, float]]:
        """(label, probability), the largest logit first."""
        order = self.logits.sort(descending=True, stable=True).indices[:count].tolist()
        return [(label, float(self.probabilities[label])) for label in order]


def predictions(
    model: Model, found: Iterable[Picture], batch: int = 32, size: int | None = None
) -> Iterator[Prediction | Picture]:
    """The prediction of each image, in order; an image that cannot be read comes back as it is.

    Raises:
        InputError: the model has no classes, or does not take images of the size.
    """
    if model.about.classes is None:
        raise InputError(f"{model.path} is a backbone alone: it gives features and has no classes; give a classifier")
    augment = model.about.preprocessing.augment(size)
    side = size or model.about.preprocessing.size[0]
    for group in _batched(found, batch):
        views = {n: augment.view(p.pixels, 0, {"size": side}) for n, p in enumerate(group) if p.pixels is not None}
        answers = {}
        if views:
            logits = _answers(model, torch.stack(list(views.values())), size)
            answers = dict(zip(views, zip(logits, model.probabilities(logits), strict=True), strict=True))
        for number, picture in enumerate(group):
            if number in answers:
                yield Prediction(picture.name, *answers[number], views[number])
            else:
                yield picture


def predict(args: argparse.Namespace) -> None:
    """The command.

    Raises:
        InputError: no image can be read, or the model cannot be used.
    """
    if args.sheet is not None and not args.sheet.parent.is_dir():
        raise InputError(f"--sheet {args.sheet}: there is no folder {args.sheet.parent}; make it first")
    model = open_model(args.model, distributed.device())
    found = pictures(args.images, model.about.preprocessing.channels)
    rows: list[tuple[str, list[tuple[int, float]]]] = []
    drawn: list[Prediction] = []
    faults: list[Picture] = []
    for each in predictions(model, found, args.batch, args.size):
        if isinstance(each, Picture):
            faults.append(each)
            continue
        rows.append((each.name, each.best(args.top)))
        if args.sheet is not None and len(drawn) < DRAWN:
            drawn.append(each)
    classes = model.about.classes
    assert classes is not None
    if not rows:
        listed = "".join(f"\n  {fault.name}: {fault.reason}" for fault in faults[:10])
        raise InputError(f"none of the {len(faults)} images can be read:{listed}")
    said = [(name, [(classes[label], label, share) for label, share in best]) for name, best in rows]
    show: dict[str, Callable[[Said], None]] = {"table": _table, "json": partial(_json, faults=faults), "csv": _csv}
    show[args.format](said)
    for fault in faults:
        print(f"penstock: cannot be read: {fault.name}: {fault.reason}", file=sys.stderr)
    if args.sheet is not None:
        _sheet(args.sheet, drawn, classes, len(rows))


Said = Sequence[tuple[str, list[tuple[str, int, float]]]]  # image, then (class, label, probability) from the surest on


def _batched(found: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    group: list[Picture] = []
    for picture in found:
        group.append(picture)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _answers(model: Model, images: Tensor, size: int | None) -> Tensor:
    own = model.about.preprocessing.size
    if tuple(images.shape[-2:]) != own and model.path.is_file():
        raise InputError(
            f"--size {size}: {model.path} takes images of {own[0]} x {own[1]} alone; give its export folder"
        )
    try:
        logits = model.answers(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        if size is None:
            raise
        raise InputError(f"--size {size}: {model.path} does not take such images: {error}") from error
    if not logits.isfinite().all():
        raise InputError(f"some logits of {model.path} are not finite: the classifier has diverged")
    return logits


def _table(said: Said) -> None:
    from rich.bar import Bar
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("label", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    table.add_column("", width=20)
    for name, best in said:
        for place, (label, _, share) in enumerate(best):
            bar = Bar(1, 0, share, width=20)
            style = "" if place else "bold"
            table.add_row(Text("" if place else name), Text(label, style), f"{100 * share:.1f} %", bar)
        table.add_section()
    Console(highlight=False).print(table)


def _json(said: Said, faults: Sequence[Picture]) -> None:
    def told(best: list[tuple[str, int, float]]) -> list[dict[str, Any]]:
        return [{"class": name, "label": label, "probability": share} for name, label, share in best]

    found = [{"image": name, "predictions": told(best)} for name, best in said]
    unread = [{"image": fault.name, "reason": fault.reason} for fault in faults]
    print(json.dumps({"images": found, "unreadable": unread}, indent=1, ensure_ascii=False))


def _csv(said: Said) -> None:
    """A row for each image and class."""
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(("image", "rank", "class", "label", "probability"))
    for name, best in said:
        rows.writerows(
            (name, place, label, number, f"{share:.6f}") for place, (label, number, share) in enumerate(best, 1)
        )


def _sheet(path: Any, drawn: Sequence[Prediction], classes: Sequence[str], total: int) -> None:
    from penstock.augment._sheet import Cell, Row, draw_sheet

    cells = []
    for each in drawn:
        label, share = each.best(1)[0]
        caption = (f"{classes[label]} {100 * share:.0f} %", each.name.rpartition("/")[2])
        cells.append(Cell(each.view.permute(1, 2, 0).numpy(), caption))
    rows: list[Row] = [cells[at : at + COLUMNS] for at in range(0, len(cells), COLUMNS)]
    if total > len(cells):
        rows.insert(0, f"the first {len(cells):,} of {total:,} images")
    draw_sheet(rows, path)
