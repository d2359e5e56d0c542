"""`penstock augment show RECIPE`. Heavy imports wait until the command runs."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.arguments import count
from penstock.errors import DONE

if TYPE_CHECKING:
    from penstock.augment._sheet import Cell, Row
    from penstock.augment._views import View, Viewer

MIXED_ROWS = 2
DESCRIPTION = """Draw what the network sees: a row for each sample, with the stored image and the views of the epochs
that follow, keyed as in training, so these are the very pixels (one process having the whole batch). Recipes of any
stage work; only seed, duration, batch, data, augment and mix are read."""


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    augment = subparsers.add_parser("augment", help="look at what a recipe shows its network")
    commands = augment.add_subparsers(required=True, metavar="COMMAND", parser_class=_OverridesAnywhere)
    show = commands.add_parser("show", help="draw a sheet of augmented images", description=DESCRIPTION)
    add = show.add_argument
    add("recipe", metavar="RECIPE", help="a YAML file, such as those in configs/")
    add("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")
    add("--out", metavar="PNG", type=Path, default=Path("augment.png"), help="where the sheet is written (augment.png)")
    add("--samples", metavar="N", type=count, default=8, help="rows (8)")
    add("--views", metavar="N", type=count, default=6, help="times each sample is shown (6)")
    add("--epoch", metavar="N", type=int, default=0, help="the epoch to begin at, counted from 0")
    show.set_defaults(run=_show)


class _OverridesAnywhere(argparse.ArgumentParser):
    """argparse takes what stands before the first option alone; key=value may follow one, too."""

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        late = [word for word in rest if "=" in word and not word.startswith("-")]
        found.overrides = [*found.overrides, *late]
        return found, [word for word in rest if word not in late]


def _show(args: argparse.Namespace) -> int:
    from penstock.augment._sheet import draw_sheet
    from penstock.augment._views import Shown, Viewer
    from penstock.recipe import check, load

    source = load(args.recipe, args.overrides)
    source.values = {key: value for key, value in source.values.items() if key in Shown.model_fields}
    recipe = check(Shown, source)
    viewer = Viewer(recipe)
    rows = [*_views(viewer, args.epoch, args.samples, args.views), *_mixed(viewer, args.epoch, args.views + 1)]
    draw_sheet(rows, args.out)
    print(f"sheet: {args.out}")
    return DONE


def _views(viewer: "Viewer", epoch: int, samples: int, count: int) -> Iterator["Row"]:
    from penstock.augment._sheet import Cell

    positions = viewer.first_positions(epoch, samples)
    for position, servings in viewer.servings(positions, count).items():
        stored = viewer.sample(position)
        name = viewer.stream.manifest.class_name(stored.label)
        size = "" if stored.image is None else f"{stored.image.shape[1]} x {stored.image.shape[0]}"
        row = [Cell(stored.image, (name, f"{size}  {stored.key}"), stored.reason)]
        yield row + [_cell(viewer, view) for serving in servings for view in viewer.views(serving)]


def _cell(viewer: "Viewer", view: "View") -> "Cell":
    from penstock.augment import side_of
    from penstock.augment._sheet import Cell

    knobs = viewer.knobs(view.position)
    number = f", view {view.number}" if viewer.stream.augment.views > 1 else ""
    strength = f", strength {knobs['strength']:.2g}" if "strength" in knobs else ""
    where = f"epoch {view.position // viewer.round}, position {view.position}"
    size = side_of(viewer.stream.augment, view.number, knobs)
    return Cell(view.pixels, (where, f"{size} px{strength}{number}"), view.reason)


def _mixed(viewer: "Viewer", epoch: int, columns: int) -> Iterator["Row"]:
    from penstock.augment._sheet import Cell

    mix = viewer.recipe.mix
    if mix is None:
        return
    if mix.auto:
        yield "mix.auto goes by the size of the model, which is not built here; give mix.auto=false and mix.mixup=..."
        return
    yield "Mixed, with the target before smoothing:"
    mixed = viewer.mixed(epoch, MIXED_ROWS * columns)
    cells = [Cell(view.pixels, (target[0], "".join(target[1:])), view.reason) for view, target in mixed]
    yield from (cells[first : first + columns] for first in range(0, len(cells), columns))
