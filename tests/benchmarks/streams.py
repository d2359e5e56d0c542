"""Images per second and core, from files to crops: Penstock's stream beside other loaders.

    python -m tests.benchmarks.streams DATA [--quick] [--json FILE]

DATA is a tree of class folders with JPEG files; it is packed into a temporary folder. "large" are the same images
enlarged threefold with grain added, about 1500 x 1125 pixels. Every loader reads the same images and gives uint8
batches of the same random resized crop: a share of .08 to 1 of the area, aspect 3/4 to 4/3, antialiased bilinear,
mirrored half of the time. All run in this process on one thread, but for the rows with a worker. They take turns, in
another order each round, and CPU seconds are compared, those of a loader's own worker included. `floor` is less work
than any of them does: entropy decoding of the files, in memory already, at an eighth of their size, luma only.

Other loaders are measured where they are installed; penstock itself needs none of them.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import _streams_rivals as rivals
from tests.benchmarks import _streams_sides as sides
from tests.benchmarks._report import print_facts, print_table
from tests.benchmarks._streams_cpu import Meter, children
from tests.benchmarks._streams_data import Images, jpegs, prepare

COMPARED = {"of_image_folder": "ImageFolder, Pillow, v2", "of_floor": "floor"}
Side = Callable[[Images, int], Iterator[int]]  # of images and a size: endless counts of images, batch by batch
ONE_VIEW: dict[str, Side] = {
    "floor": sides.floor,
    "penstock": sides.penstock,
    "penstock, decode=whole": sides.penstock_whole,
    "penstock, 1 worker": sides.penstock_worker,
    "ImageFolder, Pillow, v2": sides.image_folder,
    "ImageFolder, to floats": sides.image_folder_floats,
    "ImageFolder, 1 worker": sides.image_folder_worker,
    "webdataset": sides.webdataset,
    "timm": sides.timm,
    "litdata": rivals.litdata,
    "MosaicML streaming": rivals.mosaic,
    "DALI on CPU": rivals.dali,
    "FFCV, jpg": rivals.ffcv,
}
VIEWS: dict[str, dict[str, Side]] = {
    "two views": {"penstock": sides.penstock_two, "ImageFolder, Pillow, v2": sides.image_folder_two},
    "2 views and 6 at 96": {"penstock": sides.penstock_multi, "ImageFolder, Pillow, v2": sides.image_folder_multi},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.streams", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("data", type=Path, metavar="DATA")
    add("--images", type=int, default=256, help="images of a set (256); of the large ones a quarter")
    add("--rounds", type=int, default=7)
    add("--sizes", type=int, nargs="+", default=[224, 160, 96])
    add("--only", nargs="+", default=[], help="measure sides whose name holds one of these words, and the floor")
    add("--quick", action="store_true", help="few images and rounds, to see that all works")
    add("--json", type=Path, help="write the results here, too")
    args = parser.parse_args()
    files = jpegs(args.data)
    if not files:
        parser.error(f"{args.data}: there are no JPEG files below it; give a tree of class folders")
    if args.quick:
        args.images, args.rounds, args.sizes = 64, 2, args.sizes[:1]
    print_facts()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        small, large = prepare(files, Path(folder), args.images)
        for images, size in [*((small, size) for size in args.sizes), *((large, size) for size in args.sizes)]:
            results += _compare(images, size, _chosen(ONE_VIEW, args.only), args.rounds, "one view")
        for case, chosen in VIEWS.items():
            results += _compare(small, args.sizes[0], _chosen(chosen, args.only), args.rounds, case)
        results += _waits(small, args.sizes[0], 4 if args.quick else 16)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _chosen(all_sides: dict[str, Side], words: list[str]) -> dict[str, Side]:
    keep = [name for name in all_sides if not words or name == "floor" or any(word in name for word in words)]
    return {name: all_sides[name] for name in keep}


def _compare(images: Images, size: int, chosen: dict[str, Side], rounds: int, case: str) -> list[dict[str, Any]]:
    """Measure the sides in turns and print their table."""
    running: dict[str, tuple[Iterator[int], Meter]] = {}
    absent: dict[str, str] = {}
    for name, side in chosen.items():
        before = children()
        try:
            batches = side(images, size)
            _take(batches, images.count)  # warms up
        except ImportError as error:
            absent[name] = f"not installed ({error.name})"
            continue
        running[name] = batches, Meter(children() - before)
    seconds: dict[str, list[float]] = {name: [] for name in running}
    names = list(running)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            batches, meter = running[name]
            meter.settle()
            began = meter.seconds()
            taken = _take(batches, images.count)
            meter.settle()
            seconds[name].append((meter.seconds() - began) / taken)
    found = []
    for name in chosen:
        record: dict[str, Any] = {
            "images": images.name,
            "case": case,
            "size": size,
            "side": name,
            "note": absent.get(name, ""),
        }
        if name in seconds:
            record["per_second"] = 1 / statistics.median(seconds[name])
            record["range"] = [1 / max(seconds[name]), 1 / min(seconds[name])]
            for field, other in COMPARED.items():
                if other in seconds:
                    pairs = zip(seconds[other], seconds[name], strict=True)
                    record[field] = statistics.median(a / b for a, b in pairs)
        found.append(record)
    _print(images, size, case, found)
    return found


def _take(batches: Iterator[int], images: int) -> int:
    taken = 0
    while taken < images:
        taken += next(batches)
    return taken


def _print(images: Images, size: int, case: str, found: list[dict[str, Any]]) -> None:
    rows = []
    for record in found:
        if "per_second" not in record:
            rows.append([record["side"], record["note"], "", "", ""])
            continue
        low, high = record["range"]
        times = [f"{record[field]:.2f} x" if field in record else "" for field in COMPARED]
        rows.append([record["side"], f"{record['per_second']:.0f}", f"{low:.0f} to {high:.0f}", *times])
    title = f"{images.name}, {case} at {size}: images per CPU second, medians of rounds"
    print_table(title, ["", "images/s", "range", "of ImageFolder", "of the floor"], rows)


def _waits(images: Images, size: int, steps: int) -> list[dict[str, Any]]:
    """The share of a training step's time that is waiting for data, with one worker."""
    found: list[dict[str, Any]] = []
    for name, open_stream in {"penstock": sides.penstock_views, "ImageFolder, Pillow, v2": sides.folder_views}.items():
        step = sides.training_step(size)
        batches = open_stream(images, size)
        step(next(batches))
        waited, began = 0.0, time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            views = next(batches)
            waited += time.perf_counter() - asked
            step(views)
        found.append({"case": "waiting", "side": name, "share": waited / (time.perf_counter() - began)})
    rows = [[record["side"], f"{record['share']:.1%}"] for record in found]
    print_table(f"{steps} training steps of a ViT-Ti/16 at {size}, 1 worker: share of waiting", ["", "share"], rows)
    return found


if __name__ == "__main__":
    main()
