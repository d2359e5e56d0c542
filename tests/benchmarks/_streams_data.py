"""The benchmark's images: a tree of class folders, the same packed, and large ones made of them."""

import io
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from penstock.streams.sets.jobs import available_cores
from penstock.streams.sets.pack import Request, pack
from penstock.streams.sets.sources import Options, open_source

ENLARGED, GRAIN, QUALITY = 3, 6.0, 90  # factor, standard deviation in grey levels, JPEG


@dataclass(frozen=True)
class Images:
    """One set, in the forms that loaders read; `work` holds what a loader makes of it for itself."""

    name: str
    count: int
    tree: Path  # CLASS/NAME.jpg
    packed: Path
    work: Path


def jpegs(data: Path) -> list[Path]:
    return sorted(data.rglob("*.[jJ][pP]*[gG]"))


def prepare(files: list[Path], folder: Path, count: int) -> tuple[Images, Images]:
    """`count` of some JPEGs, and a quarter as many enlarged ones, or 48: some loaders drop an unfinished batch."""
    chosen = random.Random(0).sample(files, min(count, len(files)))
    small = _tree(folder / "small", chosen)
    large = folder / "large" / "tree"
    for number, file in enumerate(chosen[: max(48, len(chosen) // 4)]):
        place = large / f"class{number % 4}" / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(_enlarged(file.read_bytes(), number))
    return _packed("as they are", small), _packed("large", large)


def _tree(folder: Path, files: list[Path]) -> Path:
    for number, file in enumerate(files):
        place = folder / "tree" / file.parent.name / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    return folder / "tree"


def _packed(name: str, tree: Path) -> Images:
    packed, work = tree.parent / "packed", tree.parent / "work"
    work.mkdir()
    done = pack(open_source(str(tree), Options()), str(tree), packed, Request(), available_cores(), show=False)
    return Images(name, done.manifest.samples, tree, packed, work)


def _enlarged(data: bytes, seed: int) -> bytes:
    with Image.open(io.BytesIO(data)) as file:
        image = file.convert("RGB")
    image = image.resize((image.width * ENLARGED, image.height * ENLARGED), Image.Resampling.LANCZOS)
    grain = np.random.default_rng(seed).normal(0, GRAIN, (image.height, image.width, 1))
    pixels = (np.asarray(image) + grain).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
