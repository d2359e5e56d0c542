"""Augmentation of decoded images beside timm's and torchvision's own transforms for the same recipes.

    python -m tests.benchmarks.augment IMAGES

IMAGES is a folder of JPEG files, at any depth. Both sides begin with the decoded image (ours an array, theirs a PIL
image) and end with uint8 planes; the one with erasing ends, on their side, with normalised floats, as timm erases
those. They take turns: a round is a pass of each over the same images, and the CPU seconds of a round are compared.
Every image has its own seed on both sides.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from penstock.augment.standard import Standard
from penstock.keyed import seed_sample
from penstock.streams.decode import decode
from tests.benchmarks._report import print_facts, print_table

SIZE = 224
RANDAUGMENT = "rand-m9-mstd0.5-inc1"
# name: (ours, theirs); theirs are arguments of timm's create_transform, or None for torchvision's preset.
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "crop, flip": ({}, {}),
    "randaugment": ({"policy": "randaugment"}, {"auto_augment": RANDAUGMENT}),
    "randaugment, erase": (
        {"policy": "randaugment", "erase": 0.25},
        {"auto_augment": RANDAUGMENT, "re_prob": 0.25, "re_mode": "pixel", "normalize": True},
    ),
    "trivial": ({"policy": "trivial", "interpolation": "bilinear"}, None),
    "augmix": ({"policy": "augmix"}, {"auto_augment": "augmix-m3"}),
    "three_augment, jitter": (
        {"policy": "three_augment", "color_jitter": 0.3},
        {"auto_augment": "3a", "color_jitter": 0.3},
    ),
    "jitter, grayscale, blur": (
        {"color_jitter": 0.4, "grayscale": 0.2, "blur": 0.5},
        {"color_jitter": 0.4, "grayscale_prob": 0.2, "gaussian_blur_prob": 0.5},
    ),
}
Pass = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.augment", description=__doc__.partition("\n")[0])
    parser.add_argument("images", type=Path, metavar="IMAGES")
    parser.add_argument("--count", type=int, default=100, help="images in a pass (100)")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print_facts()
    torch.set_num_threads(1)
    files = sorted(args.images.rglob("*.[jJ][pP]*[gG]"))
    chosen = random.Random(0).sample(files, min(args.count, len(files)))
    arrays = [decode(file.read_bytes()) for file in chosen]
    rows = []
    for name, (ours, theirs) in RECIPES.items():
        passes = {"ours": _ours(ours, arrays), "theirs": _theirs(theirs, [Image.fromarray(a) for a in arrays])}
        seconds: dict[str, list[float]] = {side: [] for side in passes}
        for number in range(args.rounds + 1):  # the first warms up
            for side, run in passes.items():
                began = time.process_time()
                run()
                if number:
                    seconds[side].append(time.process_time() - began)
        ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
        speeds = [f"{len(arrays) / statistics.median(times):.0f}" for times in seconds.values()]
        rows.append([name, *speeds, f"{ratio:.2f} x"])
    title = f"{SIZE} x {SIZE}, {len(arrays)} images, one thread; medians of {args.rounds} rounds, images per CPU second"
    print_table(title, ["", "ours", "timm or torchvision", "ratio"], rows)


def _ours(options: dict[str, Any], arrays: list[np.ndarray]) -> Pass:
    augment = Standard(Standard.Config(**options))
    knobs = {"size": SIZE, "strength": 1.0}

    def run() -> None:
        for position, array in enumerate(arrays):
            seed_sample(0, position, 0)
            augment.view(array, 0, knobs).contiguous()

    return run


def _theirs(options: dict[str, Any] | None, pictures: list[Image.Image]) -> Pass:
    if options is None:
        from torchvision.transforms import v2

        mode = v2.InterpolationMode.BILINEAR
        flip, policy = v2.RandomHorizontalFlip(), v2.TrivialAugmentWide(interpolation=mode)
        transform: Any = v2.Compose([v2.RandomResizedCrop(SIZE, interpolation=mode), flip, policy, v2.PILToTensor()])
    else:
        from timm.data import create_transform

        settings = {"normalize": False, "interpolation": "bicubic", "color_jitter": None, **options}
        transform = create_transform(SIZE, is_training=True, **settings)

    def run() -> None:
        for position, picture in enumerate(pictures):
            seed_sample(0, position, 0)
            transform(picture)

    return run


if __name__ == "__main__":
    main()
