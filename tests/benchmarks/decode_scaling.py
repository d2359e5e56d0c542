"""JPEGs decoded smaller, where the crop allows it, beside whole decoding.

    python -m tests.benchmarks.decode_scaling IMAGES

IMAGES is a folder of JPEG files, at any depth. Both sides go from the file's bytes to the view. They take turns, image
by image, after a pass that warms up; the order of the two changes with each image, and CPU seconds are compared.
"Difference" is the mean absolute one between the two sides' views, in grey levels of 255, over those images that were
decoded smaller; beside it that of a whole view from the same one resized half a pixel off, a yardstick.
"""

import argparse
import random
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.augment import AUGMENTATIONS, Boxed
from penstock.keyed import seed_sample
from penstock.schedule import knobs_of
from penstock.streams.decode import decode, decode_smaller
from penstock.streams.loader import need_of_views
from tests.benchmarks._report import print_facts, print_table

SIZES = (224, 160, 128, 96)
AUGMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "crop_flip": ("crop_flip", {}),
    "standard, random_resized": ("standard", {}),
    "standard, simple": ("standard", {"crop": "simple"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.decode_scaling", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("images", type=Path, metavar="IMAGES")
    parser.add_argument("--count", type=int, default=100, help="images in a pass (100)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print_facts()
    torch.set_num_threads(1)
    files = sorted(args.images.rglob("*.[jJ][pP]*[gG]"))
    chosen = [file.read_bytes() for file in random.Random(0).sample(files, min(args.count, len(files)))]
    rows = []
    for name, (kind, options) in AUGMENTS.items():
        augment: Any = AUGMENTATIONS.get(kind)
        augment = augment(augment.Config(**options))
        rows += [[name if size == SIZES[0] else "", *_measure(augment, size, chosen, args.rounds)] for size in SIZES]
    title = f"{len(chosen)} images, one thread; medians of {args.rounds} rounds, images per CPU second"
    header = ["", "size", "whole", "smaller", "ratio", "1/2", "1/4", "1/8", "difference", "half a pixel"]
    print_table(title, header, rows)


def _measure(augment: Boxed, size: int, images: list[bytes], rounds: int) -> list[str]:
    knobs = {**knobs_of(augment.config), "size": size}
    sides = (_whole, _smaller)
    times: dict[Any, list[float]] = {side: [] for side in sides}
    factors, far, yardstick = [], [], []
    for number in range(rounds + 1):  # the first warms up, and looks at the pixels
        seconds = dict.fromkeys(sides, 0.0)
        for position, data in enumerate(images):
            views, factor = {}, {}
            for side in sides if (number + position) % 2 else sides[::-1]:
                began = time.process_time()
                views[side], factor[side] = side(augment, knobs, position, data)
                seconds[side] += time.process_time() - began
            if number == 0:
                factors.append(factor[_smaller])
                if factors[-1] > 1:
                    far.append(_difference(views[_whole], views[_smaller]))
                    yardstick.append(_difference(views[_whole], _half_a_pixel_off(views[_whole])))
        if number:
            for side in sides:
                times[side].append(seconds[side])
    ratio = statistics.median(a / b for a, b in zip(times[_whole], times[_smaller], strict=True))
    speeds = [f"{len(images) / statistics.median(times[side]):.0f}" for side in sides]
    shares = [f"{100 * factors.count(factor) / len(images):.0f} %" for factor in (2, 4, 8)]
    means = [f"{statistics.fmean(values):.2f}" if values else "-" for values in (far, yardstick)]
    return [str(size), *speeds, f"{ratio:.2f} x", *shares, *means]


def _whole(augment: Boxed, knobs: dict[str, Any], position: int, data: bytes) -> tuple[Tensor, int]:
    image = decode(data)
    seed_sample(0, position, 0)
    return augment.view(image, 0, knobs).contiguous(), 1


def _smaller(augment: Boxed, knobs: dict[str, Any], position: int, data: bytes) -> tuple[Tensor, int]:
    image, whole = decode_smaller(data, 3, partial(need_of_views, augment, knobs, [(0, position)]))
    seed_sample(0, position, 0)
    return augment.view(image, 0, knobs, whole).contiguous(), whole.factor if whole else 1


def _difference(one: Tensor, other: Tensor) -> float:
    return (one.float() - other.float()).abs().mean().item()


def _half_a_pixel_off(view: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(view.float(), (0, 1, 0, 1), "replicate"), 2, 1)


if __name__ == "__main__":
    main()
